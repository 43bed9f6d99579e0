"""What metrics require of samples and of a reference, checked before anything is generated."""

from collections.abc import Collection, Mapping
from typing import Any

from dmf.errors import InputError
from dmf.evaluation.protocols import Protocol
from dmf.evaluation.reference_statistics import Reference

_REMEDY = "give another, or other --metrics"


def check_image_count(
    protocol: Protocol, widths: Mapping[str, int], count: int, *, field: str, value: Any
) -> None:
    """Checks that covariances are not singular.

    Args:
      protocol: whose metrics are computed.
      widths: number of values of the features of an image, by kind of features.
      count: number of images.
      field, value: what the error is about.

    Raises:
      InputError: there are no more images than values of their features.
    """
    for name, metric in protocol.metrics_that_need("moments").items():
        width = widths[metric.features]
        if count <= width:
            raise InputError(
                field, value,
                f"{name} needs more than {width} images (the feature dimension); got {count}; give "
                "more images, or other --metrics",
            )


def missing_features(protocol: Protocol, reference: Reference) -> list[str]:
    """The kinds of features that a reference must store and does not."""
    return [kind for kind in protocol.stored_features if kind not in reference.features]


def check_reference_file(protocol: Protocol, reference: Reference, *, path: str) -> None:
    """Checks that a file of statistics has what the metrics of a protocol need.

    Raises:
      InputError: it lacks moments, or features and the images to compute them from.
    """
    for name, metric in protocol.metrics_that_need("moments").items():
        if metric.features not in reference.moments:
            raise InputError(
                "reference", path,
                f"it has statistics of {', '.join(reference.moments)}, and {name} needs those of "
                f"{metric.features}; {_REMEDY}",
            )
    missing = missing_features(protocol, reference)
    if missing and reference.images is None:
        names = [name for name, metric in protocol.metrics_that_need("features").items()
                 if metric.features in missing]
        raise InputError(
            "reference", path,
            f"it has no images (arr_0), which {', '.join(names)} need{'s' * (len(names) == 1)}; "
            f"{_REMEDY}",
        )


def check_same_features(
    protocol: Protocol,
    widths: Mapping[str, int],
    reference_widths: Mapping[str, int],
    *,
    reference: str,
    shape: Collection[int],
) -> None:
    """Checks that features of samples and of a reference can be compared.

    Args:
      protocol: whose metrics are computed.
      widths: number of values of the features of a sample, by kind of features.
      reference_widths: those of the reference, where they are known.
      reference: name of the reference.
      shape: (h, w, c) of a sample.

    Raises:
      InputError: they have different numbers of values.
    """
    for name, metric in protocol.metrics_by_name.items():
        kind = metric.features
        if reference_widths.get(kind, widths[kind]) != widths[kind]:
            raise InputError(
                "reference", reference,
                f"its {kind} features have {reference_widths[kind]} values per image, and those of "
                f"images of shape {tuple(shape)} have {widths[kind]}; {name} cannot compare them",
            )


def check_labels(protocol: Protocol, *, reference: bool, samples: bool) -> None:
    """Checks that labels are there where a metric needs them.

    Args:
      protocol: whose metrics are computed.
      reference, samples: whether they have labels.

    Raises:
      InputError: they have none.
    """
    for name in protocol.metrics_that_need("labels"):
        for whose, labelled in (("reference has", reference), ("samples have", samples)):
            if not labelled:
                raise InputError(
                    "evaluation.metrics", name, f"the {whose} no labels; give other --metrics"
                )
