"""training/build.py: a GPU that is too small is announced."""

import pytest
from conftest import make_backbone

from medusa_model import MedusaConfig, MedusaModel
from training.build import warn_of_memory


@pytest.mark.parametrize("frozen", [True, False])
def test_a_gpu_that_is_too_small_is_announced(frozen, caplog):
    """AdamW keeps 4 numbers of each trained weight, and one of each frozen one."""
    model = MedusaModel.from_backbone(make_backbone(), MedusaConfig(medusa_num_heads=1))
    if frozen:
        model.freeze_backbone()
    backbone, heads = (sum(p.numel() for p in part.parameters()) for part in (model.backbone, model.medusa_heads))
    kept = 4 * (backbone * (1 if frozen else 4) + heads * 4)
    caplog.clear()  # of what transformers says where a test before has made it talk
    warn_of_memory(model, kept)
    assert not caplog.records
    warn_of_memory(model, kept - 1)
    assert "memory will run out" in caplog.text
