"""Build, before anything is computed: what decides the result and is said nowhere, all of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..baseline.samples import ReadOptions, sample_images
from ..contract.contract import Contract
from ..contract.task import undecided_task
from ..errors import ContractError, IncompleteContractError
from .job import Remarks

if TYPE_CHECKING:
    from ..graph.report import GraphReport

NO_NORMALIZATION = "no normalisation is declared: nothing says what is done to grey levels before the network sees them"


@dataclass(frozen=True)
class Question:
    """What is said nowhere, in a sentence, and the option that would say it."""

    option: str
    text: str


@dataclass(frozen=True)
class Inquiry:
    """Looks at a model as it is opened, before anything of it is run, and asks for all that is missing in one message.

    Attributes:
        name: Of the model, for the message.
        samples: As given to ``build``; of the first image the header and one band of pixels are read. None: there are
            none, so that the build goes on and what is missing is a warning.
        read: How images are to be read.
        tile: As given to ``build``.
        remarks: Where warnings go.
    """

    name: str
    samples: Any
    read: ReadOptions
    tile: Sequence[int] | None
    remarks: Remarks

    def __call__(self, report: GraphReport, contract: Contract) -> None:
        """Raises IncompleteContractError where samples are there, and something is missing.

        Args:
            report: What ``inspect`` says of the graph, of the outputs that are predicted.
            contract: What options, files and metadata declare.
        """
        open_ends = _questions_of_network(report, contract, self.tile)
        if self.samples is not None:
            open_ends = _questions_of_image(report, contract, sample_images(self.samples)[0], self.read) + open_ends
            if open_ends:
                raise _ask(self.name, open_ends)
            return
        if contract.normalization is None:
            self.remarks.tell(f"WARNING: {NO_NORMALIZATION}; with --samples, pass --normalize as well")
        for question in (one for one in open_ends if one.option == "--task"):  # without a tile there is no engine
            self.remarks.tell(f"WARNING: {question.text}")


def _ask(name: str, questions: Sequence[Question]) -> IncompleteContractError:
    """One message for all questions; a single one is asked in its own words."""
    options = [question.option for question in questions]
    if len(questions) == 1:
        return IncompleteContractError(questions[0].text, options)
    listed = "; ".join(f"({k}) {question.text}" for k, question in enumerate(questions, start=1))
    return IncompleteContractError(
        f"{name} leaves {len(questions)} things open that decide the result: {listed}", options
    )


def _questions_of_network(report: GraphReport, contract: Contract, tile: Sequence[int] | None) -> list[Question]:
    """What the outputs mean, and the tile of a network whose tiles change the answer."""
    found = list[Question]()
    outputs = [(o.name, o.channels, op) for o, op in zip(report.outputs, report.final_ops, strict=True)]
    if text := undecided_task(contract, outputs):
        found.append(Question("--task", text))
    free = any(n is None for i in report.inputs for axis, n in zip(i.axes, i.shape, strict=True) if axis in "ZYX")
    reasons = [reason for o in report.outputs for reason in o.reasons if not o.exact]
    if reasons and free and not (tile or contract.trained_tile):
        text = f"the network cannot be tiled exactly ({reasons[0]}), so the tile size changes its answer"
        found.append(Question("--tile", f"{text}; pass the tile it was trained with: --tile HxW"))
    return found


def _questions_of_image(report: GraphReport, contract: Contract, image: Any, read: ReadOptions) -> list[Question]:
    """How the first sample is read, and what is done to its pixels."""
    from ..images.normalize import missing_normalization
    from ..images.open import open_image

    spatial = sum(axis in "ZYX" for axis in report.inputs[0].axes)
    counts = [i.shape[i.axes.index("C")] if "C" in i.axes else 1 for i in report.inputs]
    channels = None if None in counts else sum(n for n in counts if n is not None)
    reading = replace(read.reading, glance=True)
    found = list[Question]()
    try:
        source = open_image(image, contract, reading, spatial=spatial, network_channels=channels)
    except ContractError as error:
        try:  # without a word of what the network takes: are its channels the trouble, or its axes?
            source = open_image(image, Contract(), replace(reading, channels=None), spatial=spatial)
        except ContractError:
            return [Question("--axes", str(error))]
        found.append(Question("--channels", str(error)))
    with source:
        if contract.normalization is None and source.dtype.kind in "iu":
            found.append(Question("--normalize", str(missing_normalization(source))))
    return found
