"""A directory of heads for the Hub: a model card from what the run has left, and the upload."""

import json
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from common.errors import BadInput, first_line


def write_card(run: Path, config: dict, base: str, licence: str | None, directory: Path):
    """README.md. run: the directory of the training run, which may have train_command.txt and accuracy.json."""
    kind = config["medusa_head_type"] + (" with a prefix layer" if config.get("medusa_prefix_layer") else "")
    guessed = config.get("medusa_vocab_size") or config["vocab_size"]
    head = {"base_model": base, "library_name": "medusa", "tags": ["medusa", "speculative-decoding"]}
    head |= {"license": licence} if licence else {}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# Medusa heads for {base}", ""]
    lines += [
        f"{config['medusa_num_heads']} heads ({kind}) of {config['medusa_num_layers']} ResBlocks, which guess "
        f"{guessed:,} of {config['vocab_size']:,} tokens. Head k guesses the token k + 1 places ahead of the last one "
        "read (arXiv 2401.10774). With exact acceptance the text is the backbone's own.",
        "",
    ]
    if (path := run / "accuracy.json").is_file():
        own = json.loads(path.read_text()).get("own")
        if own:
            lines += ["On the backbone's own answers to held-out prompts:", "", "| head | top-1 | top-5 |"]
            lines += ["| --- | --- | --- |"]
            lines += [f"| {k} | {top[0]:.3f} | {top[4]:.3f} |" for k, top in enumerate(own["top"]) if k]
            lines += ["", "| draft tree | guesses | tokens per pass (simulated) |", "| --- | --- | --- |"]
            lines += [f"| {row['tree']} | {row['nodes']} | {row['length']:.2f} |" for row in own["acceptance"]]
            lines += [""]
    if (path := run / "train_command.txt").is_file():
        lines += ["How they were made:", "", "```", path.read_text().rstrip(), "```", ""]
    else:
        lines += ["How they were made is not known: the run's train_command.txt was not there.", ""]
    (directory / "README.md").write_text("\n".join(lines), encoding="utf-8")


def upload(directory: Path, repo_id: str):
    """Raises BadInput if the Hub refuses."""
    api = HfApi()
    try:
        url = api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message="Medusa heads")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BadInput(f"--repo_id {repo_id}: the upload failed ({first_line(error)}). Try `hf auth login`") from error
    print(f"uploaded to {url}")
