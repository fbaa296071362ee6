"""Makes pretrained.npz: tiny random models of transformers, in float32.

For each family its config.json, its weights by their names, tokens and the
logits; for Llama also, in float64, the gradient of the mean next-token loss
with respect to each weight. Weights are drawn, biases and norms too, and
rounded to bfloat16, so that files of either type hold the same numbers.

Run: python -m tests.golden.pretrained
"""

import json

import numpy as np
import torch
import transformers

from tests.golden import _oracle

PACKAGES = ["torch", "transformers"]
BATCH, TOKENS, VOCABULARY = 2, 40, 67
_SHARED = {
  "vocab_size": VOCABULARY,
  "hidden_size": 32,
  "intermediate_size": 50,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
}
# The trained length is below TOKENS: all three branches of the scaling count.
_LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
MODELS = {
  "llama": {
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": _LLAMA3,
  },
  "qwen2": {
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
  },
  "qwen3": {
    "head_dim": 16,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
      "rope_type": "linear",
      "rope_theta": 10000.0,
      "factor": 2.0,
    },
  },
}


def make() -> dict[str, np.ndarray]:
  """Everything that the file holds, but the versions."""
  out = {}
  for seed, (family, special) in enumerate(MODELS.items()):
    config = transformers.AutoConfig.for_model(family, **_SHARED | special)
    model = transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.float32
    ).eval()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
      for name, x in model.named_parameters():
        drawn = torch.tensor(rng.standard_normal(x.shape), dtype=x.dtype)
        norm = name.endswith("norm.weight")
        wide = 1 + 0.2 * drawn if norm else 0.15 * drawn
        x.copy_(wide.to(torch.bfloat16))
    tokens = rng.integers(0, VOCABULARY, (BATCH, TOKENS))
    with torch.no_grad():
      logits = model(torch.tensor(tokens)).logits
    said = json.loads(config.to_json_string(use_diff=False))
    said["architectures"] = [type(model).__name__]
    out[f"{family}/config"] = np.array(json.dumps(said))
    out[f"{family}/tokens"] = tokens
    out[f"{family}/logits"] = logits.numpy()
    for name, x in model.named_parameters():
      out[f"{family}/weights/{name}"] = x.detach().numpy()
    if family == "llama":
      out |= _gradients(model.double(), torch.tensor(tokens))
  return out


def _gradients(
  model: torch.nn.Module, tokens: torch.Tensor
) -> dict[str, np.ndarray]:
  logits = model(tokens).logits[:, :-1].flatten(0, 1)
  loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
  loss.backward()
  return {
    f"llama/gradients/{name}": x.grad.numpy().astype(np.float32)
    for name, x in model.named_parameters()
  }


if __name__ == "__main__":
  _oracle.save(__file__, make(), PACKAGES)
