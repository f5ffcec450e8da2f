from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from trl.trainer.utils import add_fused_lm_head, use_adapter

from decathlon.sapo.averaging import adapter_weights, add_adapter, local, snapshot, swapped

IDS = torch.tensor([[7, 9, 8, 13]])
ADAPTERS = {
    "lora": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, init_lora_weights=False),
    "embeddings": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], init_lora_weights=False),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"], init_lora_weights=False),
}


class TestSnapshots:
    def test_a_copy_of_its_own(self, tiny_model: Any) -> None:
        model = tiny_model().train()
        wanted = model.eval()(IDS).logits
        model.train()
        twin = snapshot(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(twin(IDS).logits, wanted)
        assert not twin.training and model.training
        assert not any(parameter.requires_grad for parameter in twin.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_of_a_model_with_trls_head(self, tiny_model: Any) -> None:
        """Whose forward pass is bound to the original."""
        model = tiny_model()
        add_fused_lm_head(model)
        twin = snapshot(model)
        wanted = twin(IDS).logits
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(twin(IDS).logits, wanted) and wanted.abs().max() > 0

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
    def test_precision(self, dtype: str | None, tiny_model: Any) -> None:
        twin = snapshot(tiny_model().to(torch.bfloat16), dtype)
        assert {parameter.dtype for parameter in twin.parameters()} == {getattr(torch, dtype or "bfloat16")}

    def test_tied_weights_stay_tied(self, tiny_model: Any) -> None:
        twin = snapshot(tiny_model(tie_word_embeddings=True))
        assert twin.lm_head.weight is twin.model.embed_tokens.weight


@pytest.mark.parametrize("kind", ADAPTERS)
class TestAdapters:
    def model(self, tiny_model: Any, kind: str) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(), ADAPTERS[kind])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    def test_all_of_it_and_in_order(self, kind: str, tiny_model: Any) -> None:
        model = self.model(tiny_model, kind)
        found = adapter_weights(model, "default")
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert len(found) == len(wanted) > 0 and all(one is other for one, other in zip(found, wanted, strict=True))

    def test_another_adapter_begins_with_the_same_weights(self, kind: str, tiny_model: Any) -> None:
        model = self.model(tiny_model, kind).eval()
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        state = torch.get_rng_state()
        add_adapter(model, "ema")
        assert torch.equal(torch.get_rng_state(), state)
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained
        assert model.active_adapter == "default"
        with torch.no_grad():
            wanted = model(IDS).logits
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
            assert not torch.equal(model(IDS).logits, wanted)
            with use_adapter(model, "ema"):
                assert torch.equal(model(IDS).logits, wanted)

    def test_one_that_is_there_keeps_its_weights(self, kind: str, tiny_model: Any) -> None:
        model = self.model(tiny_model, kind)
        add_adapter(model, "ema")
        with torch.no_grad():
            for parameter in adapter_weights(model, "ema"):
                parameter.fill_(3)
        add_adapter(model, "ema")
        assert all((parameter == 3).all() for parameter in adapter_weights(model, "ema"))


class TestSwaps:
    def test_back_to_the_bit(self) -> None:
        own = [torch.randn(3), torch.randn(2).to(torch.bfloat16)]
        kept = [tensor.clone() for tensor in own]
        others = [torch.randn(3), torch.randn(2)]
        with swapped(own, others):
            assert torch.equal(own[0], others[0]) and torch.equal(own[1], others[1].to(torch.bfloat16))
        assert all(torch.equal(one, other) for one, other in zip(own, kept, strict=True))

    def test_also_after_a_failure(self) -> None:
        own = [torch.zeros(2)]
        with pytest.raises(RuntimeError), swapped(own, [torch.ones(2)]):
            raise RuntimeError
        assert own[0].tolist() == [0, 0]


def test_shards() -> None:
    part = torch.ones(1)
    assert local(SimpleNamespace(ds_tensor=part)) is part
    assert local(SimpleNamespace(to_local=lambda: part)) is part
    parameter = torch.nn.Parameter(torch.zeros(2))
    assert local(parameter).data_ptr() == parameter.data_ptr() and not local(parameter).requires_grad
