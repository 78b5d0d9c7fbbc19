"""A profile of two steps of training, for benchmark/throughput.py --trace."""

from pathlib import Path

import torch
from transformers import TrainerCallback


class Trace(TrainerCallback):
    """Writes how the GPU spends two steps after the warm-up: its time by kernel, and the pauses between kernels."""

    def __init__(self, at: int, path: Path):
        self.at, self.path = at, path

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            activities = torch.profiler.ProfilerActivity
            self.profile = torch.profiler.profile(activities=[activities.CPU, activities.CUDA])
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.at + 2:  # two steps: what happens between them counts too
            return
        torch.cuda.synchronize()
        self.profile.stop()
        cuda = torch.autograd.DeviceType.CUDA
        found = [event for event in self.profile.events() if event.device_type == cuda and "#" not in event.name]
        spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in found)
        by_name: dict[str, tuple[float, int]] = {}
        pauses, end, last = [], spans[0][0], ""
        for start, stop, name in spans:
            total, count = by_name.get(name, (0.0, 0))
            by_name[name] = (total + stop - start, count + 1)
            if start > end + 20:
                pauses.append((start - spans[0][0], start - end, last, name))
            if stop > end:
                end, last = stop, name
        with self.path.open("w") as file:
            file.write(f"two steps, {(end - spans[0][0]) / 1e3:.1f} ms under the profiler\n\nGPU ms, calls, kernel\n")
            for name, (total, count) in sorted(by_name.items(), key=lambda item: -item[1][0]):
                file.write(f"{total / 1e3:9.2f} {count:6d}  {name[:120]}\n")
            file.write(
                f"\npauses of more than 20 us: {len(pauses)}, {sum(p[1] for p in pauses) / 1e3:.2f} ms in all\n"
            )
            for at, length, before, after in pauses:
                file.write(f"at {at / 1e3:8.2f} ms {length:6.0f} us  {before[:60]} -> {after[:60]}\n")
