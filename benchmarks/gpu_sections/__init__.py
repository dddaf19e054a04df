"""What ``gpu.py`` measures, a module per subject; that script runs each section in a process of its own."""
