"""What the Hugging Face hub reads of the model card of an export: its header, in YAML."""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dmf.errors import InputError
from dmf.models import FROZEN_KINDS
from dmf.runtime import hub

# Class-conditional networks have the same task: the hub has none of their own.
_TASK = "unconditional-image-generation"
_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# The identifiers of https://huggingface.co/docs/hub/repositories-licenses.
_IDENTIFIERS = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear
c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0
cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl
ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0
odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2
llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = tuple(_IDENTIFIERS.split())


class Score(NamedTuple):
    """A score of a network, as `dmf evaluate` measured it.

    Attributes:
      metric: name of the metric, for example "fid".
      title: what the metric is called, and of how many sampling steps it is.
      value: the score.
      reference: name of the images that samples were compared with.
      settings: what else the score depends on: steps, count, protocol.
    """

    metric: str
    title: str
    value: float
    reference: str
    settings: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Publication:
    """What is said of an export that is pushed to the hub.

    Attributes:
      repository: OWNER/REPO.
      license: licence of the parameters, one of `LICENSES`.
      datasets: the hub's datasets that the network was trained on, each OWNER/DATASET.
      scores: scores of the network.
    """

    repository: str
    license: str
    datasets: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()

    def __post_init__(self):
        check_name("push", self.repository, "OWNER/REPO")
        for dataset in self.datasets:
            check_name("datasets", dataset, "OWNER/DATASET")
        if self.license not in LICENSES:
            close = difflib.get_close_matches(self.license.lower().replace(" ", "-"), LICENSES, 3)
            choices = ", ".join(close or ("apache-2.0", "mit", "cc-by-nc-4.0"))
            raise InputError("license", self.license, "give the licence of the parameters as the "
                             f"hub names it: {choices}; other or unknown are names too")

    @property
    def address(self) -> str:
        """The address under which commands take the export."""
        return f"{hub.HUB}{self.repository}"


def check_name(field: str, name: str, form: str) -> None:
    """Checks the name of a repository.

    >>> check_name("push", "someone/maps.git", "OWNER/REPO")
    Traceback (most recent call last):
    dmf.errors.InputError: push=someone/maps.git: give OWNER/REPO in letters, digits, -, _ and .

    Raises:
      InputError: the hub has no repositories of such names.
    """
    refused = ("--", "..")
    if (not _NAME.fullmatch(name) or any(part in name for part in refused) or len(name) > 96
            or name.endswith((".git", "-", "."))):  # fmt: skip
        raise InputError(field, name, f"give {form} in letters, digits, -, _ and .")


def header(config: Mapping[str, Any], publication: Publication) -> str:
    """The header of the model card, with the lines around it.

    Args:
      config: the config as JSON holds it; that of a frozen network has one section, its kind.
      publication: what is said of the export.

    Raises:
      InputError: huggingface_hub is not installed.
    """
    library = hub.library(publication.repository)
    scores, name = publication.scores, publication.repository.partition("/")[2]
    results = [
        library.EvalResult(
            task_type=_TASK, dataset_type=score.reference, dataset_name=score.reference,
            metric_type=score.metric, metric_name=score.title, metric_value=score.value,
            metric_args=score.settings,
        )
        for score in scores
    ]  # fmt: skip
    data = library.ModelCardData(
        license=publication.license,
        library_name="dmf",
        pipeline_tag=_TASK if "model" in config else None,
        base_model=_base_model(config),
        datasets=list(publication.datasets) or None,
        tags=_tags(config),
        metrics=list(dict.fromkeys(score.metric for score in scores)) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _base_model(config: Mapping[str, Any]) -> str | None:
    """The repository of the checkpoint that a run started from; None if it is of no repository."""
    address = hub.address(config.get("init", {}).get("checkpoint", ""))
    return address and address.repository


def _tags(config: Mapping[str, Any]) -> list[str]:
    if "model" not in config:
        return ["jax", next(kind for kind in FROZEN_KINDS if kind in config)]
    model = config["model"]
    tags = ["jax", "image-generation"]
    if "conditioning" in model:
        tags.append("flow-matching" if model["conditioning"] == "flow" else "flow-map")
    return [*tags, "class-conditional"] if model.get("num_classes") else tags
