"""What README.md and docs/ say, and what computes it anew from the raw files, for check_figures.py.

A new claim is a line of CLAIMS: its words with {} for each figure, and what computes the figures. Line breaks and **
do not matter. A new table is a line of TABLES: its headings, and its rows: a label, then the cells.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise

import raw_tables
from raw_figures import (
    GENTLE,
    LENGTHS,
    OLD_MEMORY,
    OLD_PASS,
    ONE_EPOCH,
    OWN,
    READING,
    RUINED,
    RUNS,
    SETS,
    SPEC,
    SPEC_GROUPS,
    STEPS,
    TYPES_PASS,
    a_pass,
    adapters,
    decoded,
    dot,
    follows,
    fp8_losses,
    gains,
    lm_head,
    load,
    median,
    new_4_grams,
    of_trees,
    of_types,
    own_top,
    peaks,
    promised,
    row,
    rows,
    simulated,
    steps,
    taught,
    times_of_pass,
    trial_ms,
    with_32,
)

Checks = dict[str, list[tuple[str, Callable[[], Iterable]]]]  # file: words or headings, what computes the figures

# fmt: off
CLAIMS: Checks = {
    "README.md": [
        ("{:.0f} GiB in stage 1 and {:.0f} to {:.0f} in stage 2", lambda: [peaks(1)[-1], peaks(2)[0], peaks(2)[-1]]),
        ("default takes {:.0f} and {:.0f} to {:.0f}",
         lambda: [peaks(1, "liger")[-1], peaks(2, "liger")[0], peaks(2, "liger")[-1]]),
        ("All logits run out of memory at {:,} tokens in stage 1 and from {:,} on in stage 2",
         lambda: [LENGTHS[len(peaks(stage, "hf"))] for stage in (1, 2)]),
        ("48 GB | {:.1f} | H100", lambda: [steps(1, 5, "ours")[2048]["peak_gib"]]),
        ("24 GB | {:.1f} |", lambda: [peaks(1)[1]]),
        ("25.5 | 40 GB | {:.1f} |", lambda: [peaks(2)[1]]),
        ("{:,.0f} tokens/s", lambda: [steps(1, 5, "ours")[2048]["tokens_per_s"]]),
        ("{:.1f} to {:.1f} times as fast as Liger's default chunks", lambda: gains(1, "liger")),
        ("{:.2f} to {:.2f} times as fast as all logits. -", lambda: gains(1, "hf")),
        ("{:.2f} to {:.1f} times as fast as Liger's default, partly", lambda: gains(2, "liger")),
        ("fewer layers, and {:.2f} to {:.2f} times as fast as all logits", lambda: gains(2, "hf")),
        ("{:.2f} times as fast with 3 heads at 4,096 tokens, for {:.0f} to {:.0f} % of each head's accuracy",
         lambda: [trial_ms("K=3 4096 bf16") / trial_ms("K=3 4096 Fp8"), *fp8_losses()]),
        ("head 1 is right {:.0f} % of the time on held-out conversations, and within its five best guesses {:.0f} %",
         lambda: [100 * load(ONE_EPOCH)["top"][1][rank] for rank in (0, 4)]),
        ("{:.2f} tokens per pass with 32 guesses and {:.2f} with 64 if one walks along its texts (simulated), and "
         "{:.2f} and {:.2f} (63 guesses) in a real run",
         lambda: [*(simulated(OWN, nodes) for nodes in (32, 64)),
                  *(decoded(nodes)["tokens_per_pass"] for nodes in (32, 63))]),
        ("{:.2f} times with 32 guesses and {:.2f} with 63; on two CPU cores",
         lambda: [decoded(nodes)["speed_up"] for nodes in (32, 63)]),
        ("medusa heads yield {:.2f} tokens per pass, hydra heads {:.2f}, with a prefix layer {:.2f}, and {:.2f} with "
         "trees", lambda: of_types("tokens_per_pass")),
        ("those medusa heads decode {:.2f} times as fast as the backbone alone, the ones with a prefix layer {:.2f} "
         "times", lambda: of_types("speed_up")[::2]),
        ("without changing the model's text: {:.2f} times as fast", lambda: [max(of_types("speed_up"))]),
        ("three heads of stage 2 were {:.2f} times as fast",
         lambda: [decoded(32, "decoding_cpu.csv", "3 heads, stage 2")["speed_up"]]),
        ("by its step times {:.2f} times follow with 32 guesses", lambda: [follows(32)]),
        ("a plain pass takes {:.2f} ms, {:.2f} times the time to read the weights",
         lambda: [a_pass(0)["step_ms"], a_pass(0)["step_ms"] / a_pass(0)["floor_ms"]]),
        ("63 guesses of 3 heads {:.2f} ms, so heads pay from {:.2f} tokens per pass on",
         lambda: [a_pass(63, 3)["step_ms"], a_pass(63, 3)["ratio_to_plain"]]),
        ("With {:.2f} (simulated, above), over the {:.2f} ms of that tree's pass, five heads would decode {:.2f}",
         lambda: [simulated(OWN, 64), a_pass(63)["step_ms"], simulated(OWN, 64) / a_pass(63)["ratio_to_plain"]]),
    ],
    "docs/data.md": [
        ("500 MB of JSON lines ({:,.0f} conversations of ShareGPT's shape) was read in {:.2f} s, by "
         "`datasets.load_dataset` in {:.2f} s; beyond what the imports take, memory grew by {:.0f} and {:.0f} MB",
         lambda: [median(READING, "records", what="read", who="ours"),
                  *(median(READING, "seconds", what="read", who=who) for who in ("ours", "datasets")),
                  *(median(READING, "peak_mb", "imports_mb", what="read", who=who) for who in ("ours", "datasets"))]),
        ("ran at {:,.0f} tokens a second and core, the tokenizer alone at {:,.0f}",
         lambda: [1000 * median(READING, "per_s", what="tokenise", who=who) for who in ("ours", "tokenizer")]),
    ],
    "docs/performance.md": [
        ("{:.0f} TFLOP/s on this H100 and {:.0f} on this H200",
         lambda: [steps(stage, 3, "ours")[1024]["ceiling_tflops"] for stage in (1, 2)]),
        ("they do {:.0f} and {:.0f}", lambda: [steps(stage, 3, "ours")[1024]["sustained_tflops"] for stage in (1, 2)]),
        ("is at {:.2f}.", lambda: [(x := steps(1, 5, "ours")[8192])["useful_tflops"] / x["sustained_tflops"]]),
        ("{:.2f}, {:.2f} and {:.2f} times as fast as bf16 with 3 heads",
         lambda: [steps(1, 3, "ours")[length]["step_time_s"] / fp8["step_time_s"]
                  for length, fp8 in steps(1, 3, "ours", fp8=True).items()]),
        ("each accuracy loses {:.0f} to {:.0f} % of itself", fp8_losses),
        ("kl takes {:.2f} times as long as ce and lk {:.2f} times, for {:.2f} GiB more",
         lambda: [*(taught(kind) / taught("ce") for kind in ("kl", "lk")),
                  taught("kl", "extra_gib") - taught("ce", "extra_gib")]),
        ("Packing gives {:.2f} times the rows of padding", lambda: [
            row(STEPS[1], data="packed")["rows_per_s"] / row(STEPS[1], data="padded")["rows_per_s"]]),
    ],
    "docs/distributed.md": [
        ("{:.1f} for 2 GPUs, stage 1, 5 heads; {:.1f} for 4, stage 2, 5 heads",
         lambda: [row(OLD_MEMORY, world_size=n, length=1024)["peak_gib"] for n in (2, 4)]),
        ("{:.1f} was measured", lambda: [row(OLD_MEMORY, world_size=64, length=1024)["peak_gib"]]),
    ],
    "docs/heads.md": [
        ("would make {:.2f} (medusa) and {:.2f} (hydra) times plain decoding", lambda: [
            y / row(TYPES_PASS, model="smollm2", nodes=32, head_type=kind)["ratio_to_plain"]
            for kind, y in zip(("medusa", "hydra"), of_types("tokens_per_pass"), strict=False)]),
        ("yield {:.2f} (simulated, 32 guesses) and {:.2f} (decoded)",
         lambda: [of_trees("hydra_prefix", "adaptive")[32], of_types("tokens_per_pass")[3]]),
        ("[{:.0f} % to the tokens per pass]",
         lambda: [100 * (x := of_types("tokens_per_pass"))[2] / x[1] - 100]),
    ],
    "docs/decoding.md": [
        ("{:.2f} ms ({:.1f} GB at {:.2f} TB/s, a copy), so a plain pass is {:.2f} times that",
         lambda: [*(a_pass(0)[key] for key in ("floor_ms", "weight_gb", "bandwidth_tb_s")),
                  a_pass(0)["step_ms"] / a_pass(0)["floor_ms"]]),
        ("a plain pass took {:.2f} ms and one with 3 heads and 63 guesses {:.2f}, {:.2f} times as long",
         lambda: [(x := a_pass(63, 3, OLD_PASS, 7680))["plain_ms"], x["step_ms"], x["ratio_to_plain"]]),
        ("promise {:.2f} with 32 nodes and yield {:.2f}", lambda: [promised(OWN, 5, 32), simulated(OWN, 32)]),
        ("{:.0f} of {:.0f} answers of 256 tokens",
         lambda: [(x := decoded(32))["prompts"] - x["identical"], x["prompts"]]),
    ],
    "docs/results.md": [
        ("{:.2f} tokens per pass with 32 guesses, {:,.0f} tokens/s instead of {:,.0f}, {:.2f} times as fast",
         lambda: [(x := load(SPEC))["heads"]["tokens_per_pass"], x["heads"]["tokens_per_s"],
                  x["plain"]["tokens_per_s"], x["speed_up"]]),
        ("Knowing the path adds {:.0f} % to the tokens per pass, the prefix layer {:.0f} % more and grown trees "
         "another {:.0f} %", lambda: [100 * b / a - 100 for a, b in pairwise(of_types("tokens_per_pass"))]),
        ("took {:.2f} to {:.2f} times a plain one in every group", lambda: [
            find(times_of_pass(group)[0] for group in SPEC_GROUPS) for find in (min, max)]),
        ("took up to {:.2f} times", lambda: [max(max(times_of_pass(group)) for group in SPEC_GROUPS)]),
        ("{:.2f} and {:.2f} in math_reasoning and rag, {:.2f} in mt_bench",
         lambda: [times_of_pass(group)[2] for group in ("math_reasoning", "rag", "mt_bench")]),
        ("{:,.0f} tokens/s without those, {:,.0f} rows/s",
         lambda: [row(RUNS, run="f1")[key] for key in ("tokens_per_s", "rows_per_s")]),
    ],
    "docs/lora.md": [
        ("{:.2f} tokens per pass instead of {:.2f}", lambda: [with_32("l0"), with_32("s1b")]),
    ],
    "docs/log.md": [
        ("simulated, 32 guesses: {:.2f} with adapters, {:.2f} without", lambda: [with_32("l0"), with_32("s1b")]),
        ("new is {} instead of {}, the KL {} a token",
         lambda: [dot(adapters("l0")["drift"][key]) for key in ("distinct_4", "distinct_4_original", "kl")]),
        ("folded: {:.1f} instead of {:.1f} ms; no clipping: {:.1f}",
         lambda: [trial_ms(run) for run in ("folded scale and no select 2048", "base 2048", "no clip 2048")]),
        ("{:.1f} % slower |", lambda: [100 * trial_ms("attention: FLASH_ATTENTION") / trial_ms("base 2048") - 100]),
        ("{:.1f} % and {:.1f} %, for 0.5 GiB",
         lambda: [100 * trial_ms("base 2048") / trial_ms(f"chunk {size}") - 100 for size in (4096, 8192)]),
        ("a promise of {:.2f} for a length of {:.2f}",
         lambda: [decoded(32)["expected_length"], simulated(OWN, 32, "joint")]),
        ("{:.2f} tokens per pass with 32 guesses and {:.2f} with 63",
         lambda: [simulated(RUINED, nodes, "best") for nodes in (32, 63)]),
        ("right about {} of ShareGPT's held-out tokens, where SmolLM2 was right about {}",
         lambda: [lm_head(RUINED), lm_head(OWN)]),
        ("of the 4-grams of an answer {} are new, of SmolLM2's {}",
         lambda: [new_4_grams("stage 2, lr 5e-4"), new_4_grams("SmolLM2-135M-Instruct")]),
        ("right about {} of ShareGPT's tokens", lambda: [lm_head(GENTLE)]),
        ("{:.2f} tokens per pass instead of {:.2f} with 32 guesses, {:.2f} instead of {:.2f} with 8",
         lambda: [row("adaptive_trees.csv", nodes=nodes)[f"{kind}_tokens_per_pass"] for nodes in (32, 8)
                  for kind in ("chosen_each_pass", "fixed_tree")]),
        ("began at {} and ended at {} with lr 2.5e-5 and {} with 5e-4", lambda: [
            dot(sum(row["head_0_top1"] for row in logs) / len(logs), digits=2) for logs in (
                rows("stage2_2.5e-5_training.csv")[:3], rows("stage2_2.5e-5_training.csv")[-10:],
                rows("stage2_cpu_training.csv")[-20:])]),
    ],
}

TABLES: Checks = {
    "docs/performance.md": [
        ("stage 1, H100 | 1024 | 2048 | 4096 | 8192", lambda: raw_tables.step_table(1)),
        ("stage 2, H200 | 1024 | 2048 | 4096 | 8192", lambda: raw_tables.step_table(2)),
        (" | 1024 | 2048 | 4096 | 8192", raw_tables.memory_table),
        ("loss | 4,096 rows | 8,192 rows | 16,384 rows", raw_tables.taught_table),
        ("tokens that heads guess | online: tokens/s | times | peak GiB | from states: tokens/s | times | peak GiB | "
         "rank of eight: peak GiB", raw_tables.few_table),
        ("tokens | tokens/s | peak GiB (reserved) | useful TFLOP/s", lambda: raw_tables.lined(
            STEPS[1], [(f"{n:,}", {"length": n}) for n in (32768, 65536, 131072)],
            "{tokens_per_s:,.0f}", "{peak_gib:.1f} ({reserved_gib:.1f})", "{useful_tflops:.0f}")),
        ("batches | rows/s | tokens/s | step", lambda: raw_tables.lined(
            STEPS[1], [(kind, {"data": kind}) for kind in ("padded", "grouped", "packed")],
            "{rows_per_s:,.0f}", "{tokens_per_s:,.0f}", "{step_time_s:.3f} s")),
        ("trained with | head 1 | 2 | 3 | 4 | 5", lambda: [
            [f"{kind} backbone", *(dot(x["top1"]) for x in rows("fp8_accuracy.csv", trained_with=kind)[1:])]
            for kind in ("bf16", "fp8")]),
        (" | 4,096 rows | 8,192 rows | 16,384 rows", raw_tables.loss_table),
    ],
    "docs/heads.md": [
        ("guesses | medusa | markov | hydra", raw_tables.types_pass_table),
        (" | medusa | markov | hydra | hydra and prefix layer", raw_tables.yields_table),
    ],
    "docs/distributed.md": [("GiB, 8 ranks, B = 4 | 1024 | 2048 | 4096 | 8192", raw_tables.rank_table)],
    "docs/decoding.md": [
        ("heads | guesses | ms per pass | a pass must yield | SmolLM2's accuracies would give | "
         "speed-up that would be", raw_tables.pays_table),
        ("tokens that heads guess | 32 guesses: ms per pass | times plain | 63 guesses: ms per pass | times plain",
         raw_tables.few_pass_table),
        ("V' of 49,152 | ShareGPT, held out | Spec-Bench", raw_tables.coverage_table),
    ],
    "docs/results.md": [
        ("recipe | top-1, heads 1 to 3 | chain | 8 guesses | 32 | 63", raw_tables.recipe_table),
        ("heads | top-1, heads 1 to 5 | top-5", lambda: [
            [label, own_top(file), own_top(file, 5)] for label, file in SETS.items()]),
        ("heads | chain of 5 | 4 guesses | 8 | 16 | 32 | 64", lambda: [
            [label, f"{simulated(file, 5, 'chain'):.2f}", *(f"{simulated(file, n):.2f}" for n in (4, 8, 16, 32, 64))]
            for label, file in SETS.items()]),
        ("own answers, 3 ResBlocks | tokens per pass (60 prompts) | speed-up measured, 6216ae2 | ms per pass, "
         "before | after | speed-up that follows", raw_tables.faster_table),
        (" | tokens/s | tokens per pass | ms per pass | speed-up | identical texts", raw_tables.cpu_table),
        ("group | medusa | hydra | hydra and prefix layer | with grown trees", raw_tables.groups_table),
        ("times plain decoding | medusa | hydra | hydra and prefix layer | with grown trees", raw_tables.times_table),
        ("guesses | medusa | markov | hydra | hydra, grown trees | hydra and prefix layer | with grown trees",
         raw_tables.types_table),
        (" | top-1, untrained | top-1 | top-5, untrained | top-5 | top-10", raw_tables.held_out_table),
        ("H100, own answers | tokens/s | tokens per pass | ms per pass | speed-up | identical texts",
         lambda: raw_tables.lined("decoding_h100.csv", [
             (label, {"nodes": nodes, "label": "own answers"}) for label, nodes in (
                ("plain decoding", 0), ("chain of 5", 5), *((f"{n} guesses", n) for n in (8, 16, 32, 63)))],
            "{tokens_per_s:,.1f}", "{tokens_per_pass:.2f}", "{step_ms:.2f}", "{speed_up:.2f}",
            "{identical:.0f} of {prompts:.0f}")),
    ],
    "docs/log.md": [
        ("step | stage 1, heads 1 to 4 | stage 2, lr 5e-4, heads' 2e-3, lambda_0 0.2 | its lm_head",
         raw_tables.log_table),
        ("stage 2, three heads | heads 1 to 3, own text | tokens per pass: chain, 8, 32, 63 guesses | "
         "new 4-grams (SmolLM2: .66)", raw_tables.stage_2_table),
        ("run | conversations or lines a step, settings | heads 1 to 5, held-out top-1 | tokens/s", lambda: [
            [row["run"], None, dot(*(row[f"head_{k}_top1"] for k in range(1, 6))), f"{row['tokens_per_s']:,.0f}"]
            for row in load(RUNS)]),
    ],
}
# fmt: on
