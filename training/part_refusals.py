"""Refusals of one part each of train.py, for training/refusals.py: (applies, sentence)."""


def about_states(model, data, training) -> tuple:
    """Refusals of --states_path: what was decided when the states were stored, and what needs the layers."""
    if data.states_path is None:
        return ()
    names = ("data_path", "eval_data_path", "dataset_config", "train_split", "eval_split", "eval_holdout")
    decided = [f"--{name}" for name in names if getattr(data, name)]
    needs = "--medusa_only_heads True (stage 1): stage 2 trains the backbone, and its states change"
    return (
        (not training.medusa_only_heads, f"--states_path goes with {needs}"),
        (
            bool(decided),
            f"--states_path has its conversations already, chosen when they were stored: leave out "
            f"{' and '.join(decided)}",
        ),
        (training.fp8_backbone, "--fp8_backbone does nothing with --states_path: no layer of the backbone runs"),
        (data.lazy_preprocess, "--lazy_preprocess does nothing with --states_path: the rows are tokens already"),
        (data.packing, "--packing does nothing with --states_path: heads drop padding, and no attention runs"),
    )
