"""Rows of the tables in README.md and docs/, from the raw files, for check_figures.py."""

from raw_figures import (
    GENTLE,
    KERNELS,
    LENGTHS,
    MEMORY,
    NAMES,
    OLD_KERNELS,
    OLD_MEMORY,
    ONE_EPOCH,
    OWN,
    RUINED,
    SPEC_GROUPS,
    STEPS,
    TAUGHT,
    TYPES,
    TYPES_PASS,
    Row,
    a_pass,
    decoded,
    dot,
    follows,
    load,
    new_4_grams,
    of_trees,
    of_types,
    own_top,
    promised,
    row,
    rows,
    simulated,
    small_pass,
    times_of_pass,
)


def lined(file: str, lines, *cells: str):
    """For each label and the one row of the file it stands for: what `cells` make of that row."""
    return [[label, *(cell.format(**row(file, **where)) for cell in cells)] for label, where in lines]


def grid(file: str, lines, keys, cell: str, key: str = "length", **where):
    """A column for each value of `key`. A run ends where memory does: what follows is out of memory too."""
    for label, of_line in lines:
        cells = []
        for value in keys:
            found = rows(file, **where, **of_line, **{key: value})
            lost = (found and found[0].get("peak_gib") == "OOM") or (not found and "OOM" in cells)
            cells.append("OOM" if lost else cell.format(**found[0]) if found else "")
        yield [label, *cells]


def step_table(stage: int):
    lines: list[tuple[str, Row]] = [
        (f"{heads} heads, {label}", {"heads": heads, "implementation": name} | ({"options": ""} if stage == 1 else {}))
        for heads in (3, 5)
        for name, label in NAMES.items()
    ]
    fp8 = ("3 heads, `--fp8_backbone`", {"heads": 3, "options": "fp8 backbone"})
    lines[3:3] = [fp8] if stage == 1 else []
    cell = "{tokens_per_s:,.0f}; {peak_gib:.1f}; {of_ceiling:.2f}"
    return grid(STEPS[stage], lines, LENGTHS, cell, data="random", batch_size=4)


def memory_table():
    for stage, heads in ((1, 3), (1, 5), (2, 3), (2, 5)):
        lines = [(label, {"implementation": name}) for name, label in NAMES.items()]
        lines[0] = (f"stage {stage}, {heads} heads: {lines[0][0]}", lines[0][1])
        yield from grid(MEMORY, lines, LENGTHS, "{peak_gib:.1f}", world_size=8, stage=stage, heads=heads)


def rank_table():
    pairs = ((1, 3), (1, 5), (2, 3), (2, 5))
    lines: list[tuple[str, Row]] = [
        (f"stage {stage}, {heads} heads", {"stage": stage, "heads": heads}) for stage, heads in pairs
    ]
    yield from grid(MEMORY, lines, LENGTHS, "{peak_gib:.2f}", implementation="ours")
    lines = [("stage 1, 5 heads, `fsdp1.yaml`", {"implementation": "liger fsdp1"})]
    lines += [("stage 2, 5 heads, `--offload_activations True`", {"implementation": "liger fsdp2 offload"})]
    yield from grid(OLD_MEMORY, lines, LENGTHS, "{peak_gib:.2f}")


def loss_table():
    names = {f"Liger, {size:,} rows": f"liger, {size} rows a chunk" for size in LENGTHS}
    names |= {"torch": "torch, all logits", "Liger's default": "liger, default chunks"}
    names["plain torch in chunks"] = "chunked plain torch, 2048"
    lines = [(label, {"implementation": name}) for label, name in names.items()]
    return grid("head_loss_h100.csv", lines, (4096, 8192, 16384), "{ms:.1f}; {extra_gib:.2f}", key="rows")


def taught_table():
    ours = "ours, 2048 rows a chunk"
    lines = [("ce, Liger, 2,048 rows", {"loss": "ce", "implementation": "liger, 2048 rows a chunk"})]
    lines += [(f"{kind}, 2,048 rows", {"loss": kind, "implementation": ours}) for kind in ("kl", "lk")]
    lines += [("kl, `liger_fused_linear_jsd`", {"loss": "kl", "implementation": "liger_fused_linear_jsd"})]
    lines += [("kl, all logits", {"loss": "kl", "implementation": "torch, all logits"})]
    lines += [("kl, plain torch", {"loss": "kl", "implementation": "chunked plain torch, 2048"})]
    return grid(TAUGHT, lines, (4096, 8192, 16384), "{ms:.1f}; {extra_gib:.2f}", key="rows")


FEW, FEW_MEMORY = "2026-11-26_states_and_draft_vocabulary_h100.csv", "2026-11-26_draft_vocabulary_memory_h100.csv"
SIZES = {"all 128,256": "", "65,536": 65536, "32,768": 32768, "16,384": 16384}  # of a draft vocabulary


def few_table():
    """Training: online, from stored states, and a rank of eight."""
    first = row(FEW, medusa_vocab_size="", data="random")["tokens_per_s"]
    for label, size in SIZES.items():
        cells = [label]
        for data in ("random", "stored states"):
            found = rows(FEW, medusa_vocab_size=size, data=data)
            cells += (
                ["{:,.0f}".format(x := found[0]["tokens_per_s"]), f"{x / first:.2f}"] if found else ["not run", ""]
            )
            cells += [f"{found[0]['peak_gib']:.1f}"] if found else [""]
        one_of_8 = (
            row(FEW_MEMORY, medusa_vocab_size=size)
            if size
            else row(MEMORY, stage=1, heads=5, length=2048, implementation="ours")
        )
        yield [*cells, f"{one_of_8['peak_gib']:.2f}"]


def few_pass_table():
    for label, size in SIZES.items():
        found = (
            row("2026-11-26_draft_vocabulary_step_time_h100.csv", medusa_vocab_size=size, nodes=n) for n in (32, 63)
        )
        yield [label, *(cell for x in found for cell in (f"{x['step_ms']:.2f}", f"{x['ratio_to_plain']:.2f}"))]


def recipe_table():
    for x in load("2026-11-26_recipes_h100.csv"):
        lengths = (f"{x[key]:.3f}" for key in ("chain", "8", "32", "63"))
        yield [x["recipe"], dot(*map(float, x["top1"].split()[:3])), *lengths]


def groups_table():
    for group in (*SPEC_GROUPS, "all"):
        yield [group, *(f"{y:.2f}" for y in of_types("tokens_per_pass", group))]


def times_table():
    yield ["a pass", *(f"{x:.2f}" for x in times_of_pass())]
    yield ["tokens per second", *(f"{x:.2f}" for x in of_types("speed_up"))]


def types_table():
    columns = [("medusa", "best"), ("markov", "best")]
    columns += [(kind, tree) for kind in ("hydra", "hydra_prefix") for tree in ("best", "adaptive")]
    lengths = [of_trees(*column) for column in columns]
    yield from ([str(nodes), *(f"{found[nodes]:.3f}" for found in lengths)] for nodes in lengths[0])


def yields_table():
    kinds = ("medusa", "markov", "hydra", "hydra_prefix")
    train = load(TYPES)["train"]
    yield ["training, seconds", *(f"{train[kind]['seconds']:.0f}" for kind in kinds)]
    yield ["peak memory", *(f"{train[kind]['peak_allocated_gib'] - 1e-9:.2f}" for kind in kinds)]
    yield ["top-1", *(dot(*(top[0] for top in load(TYPES)[kind]["own"]["top"][1:])) for kind in kinds)]
    yield ["tokens per pass, simulated", *(f"{of_trees(kind, 'best')[32]:.2f}" for kind in kinds)]
    yield ["the same", *(f"{of_trees(kind, 'best')[63]:.2f}" for kind in kinds)]
    for label, key in (("tokens per pass, decoded", "tokens_per_pass"), ("speed-up", "speed_up")):
        medusa, *hydra = (f"{x:.2f}" for x in of_types(key)[:3])
        yield [label, medusa, None, *hydra]
    yield ["weights", *[None] * 4]  # counted, not measured


def types_pass_table():
    for model, name in (("smollm2", "SmolLM2"), ("llama3_8b", "LLaMA-3-8B")):
        for nodes in (32, 63):
            found = (
                row(TYPES_PASS, model=model, nodes=nodes, head_type=kind) for kind in ("medusa", "markov", "hydra")
            )
            yield [f"{name}'s shapes, {nodes}", *(f"{x['ratio_to_plain']:.2f}" for x in found)]


def coverage_table():
    for size in (8192, 16384, 32768):
        x = row("2026-11-26_coverage.csv", tokens=size)
        yield [f"{size:,}", dot(x["held_out"]), dot(x["spec_bench"])]


def pays_table():
    yield ["plain", "0", f"{a_pass(0)['step_ms']:.2f}", "1", "1", "1"]
    for heads, nodes in ((1, 10), (2, 16), (2, 63), (3, 16), (3, 32), (3, 63), (5, 63)):
        found, length = a_pass(nodes, heads), promised(OWN, heads, nodes)
        figures = (found["step_ms"], found["ratio_to_plain"], length, length / found["ratio_to_plain"])
        yield ["4 or 5" if heads == 5 else str(heads), str(nodes), *(f"{figure:.2f}" for figure in figures)]


def log_table():
    for n in (450, 1900, 4100):
        one, two = (rows("stage1_and_2_h100.csv", stage=stage, step=n) for stage in (1, 2))
        heads = [dot(*(row[f"head_{k}_top1"] for row in found for k in range(1, 5))) for found in (one, two)]
        yield [f"{n:,}", *heads, dot(*(row["head_0_top1"] for row in two))]


def stage_2_table():
    for rate, file in (("5e-4", RUINED), ("2.5e-5", GENTLE)):
        lengths = [simulated(file, 3, "chain"), *(simulated(file, nodes, "best") for nodes in (8, 32, 63))]
        yield [f"lr {rate}", own_top(file), dot(*lengths, digits=2), new_4_grams(f"stage 2, lr {rate}")]


def faster_table():
    yield ["plain", "1", "1", f"{small_pass(0, OLD_KERNELS):.3f}", f"{small_pass(0):.3f}", "1"]
    for n in (32, 63):
        figures = [f"{decoded(n)[key]:.2f}" for key in ("tokens_per_pass", "speed_up")]
        figures += [f"{small_pass(n, file):.3f}" for file in (OLD_KERNELS, KERNELS)]
        yield [f"{n} guesses", *figures, f"{follows(n):.2f}"]


def cpu_table():
    nodes = {"plain": 0, "chain": 3} | {f"{n} guesses": n for n in (4, 8, 16, 32)}
    cells = ("{tokens_per_s:.1f}", "{tokens_per_pass:.2f}", "{step_ms:.1f}", "{speed_up:.2f}")
    lines = [(label, {"nodes": n}) for label, n in nodes.items()]
    return lined("decoding_cpu.csv", lines, *cells, "{identical:.0f} of {prompts:.0f}")


def held_out_table():
    both = zip(load(ONE_EPOCH)["before"], load(ONE_EPOCH)["top"], strict=True)
    for k, (old, new) in enumerate(both):
        yield [f"head {k}" if k else "lm_head", *map(dot, (old[0], new[0], old[4], new[4], new[9]))]
