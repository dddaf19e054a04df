// Which instruction sets the row functions are compiled for.
//
// GCC compiles a function marked UNET_RT_SIMD several times and the loader picks the best (ifunc, hence glibc only);
// elsewhere it is compiled once, for the target of the build. The results do not differ: see geometry.h. The loader
// calls what picks before ThreadSanitizer is there, which ends the process: under it, functions are compiled once, too.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#include <features.h>
#if defined(__GLIBC__) && __GNUC__ >= 12 && !defined(__SANITIZE_THREAD__)
#define UNET_RT_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef UNET_RT_SIMD
#define UNET_RT_SIMD
#endif
