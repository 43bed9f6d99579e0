"""Faults of a run on one's own images: sizes, classes and their names."""

from benchmarks.mutant_lists.mutant import Mutant

_SIZES = ("tests/cli/test_sizes_of_datasets.py",)
_INITIAL = ("tests/training/test_initial_checkpoint.py",)

MUTANTS = (
    Mutant(
        "classes_of_the_checkpoint", "a run on other data takes the classes of its checkpoint",
        "dmf/training/initial_checkpoint.py",
        "if _CLASSES in undecided and not _is_same_data(config, its, taken):",
        "if False:",
        _SIZES,
    ),
    Mutant(
        "silent_labels", "the label embedding is initialised anew without a line",
        "dmf/training/initial_checkpoint.py",
        "    _report_labels(config, its, anew)\n",
        "",
        _INITIAL,
    ),
    Mutant(
        "names_of_the_run", "a run does not store the names of its classes",
        "dmf/training/prepared_run.py",
        'if config.model.get("num_classes") and not settings.class_names:',
        'if config.model.get("num_classes") and settings.class_names:',
        _SIZES,
    ),
    Mutant(
        "numbers_as_names", "a run stores the numbers of its classes as their names",
        "dmf/data/build.py",
        "fit = 0 < size <= _LARGEST_NAMES and not all(map(str.isdecimal, names))",
        "fit = 0 < size <= _LARGEST_NAMES",
        _SIZES,
    ),
    Mutant(
        "captions_by_number", "samples are called by the numbers of their classes",
        "dmf/cli/sample.py",
        "label_captions(labels, num_classes, settings.class_names)",
        "label_captions(labels, num_classes)",
        ("tests/sampling/test_sample_command.py",),
    ),
    Mutant(
        "pixels_of_few_images", "the distance of pixels is proposed for few images",
        "dmf/cli/train.py",
        "return sizes.samples <= sizes.input_size**2 * sizes.channels",
        "return sizes.samples <= sizes.input_size",
        _SIZES,
    ),
)  # fmt: skip
