"""The smallest valid configurations, for tests that change one thing."""

MINIMAL = {
    "base_model": "model",
    "learning_rate": 1e-4,
    "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
}
LORA = MINIMAL | {"adapter": "lora", "lora_r": 8, "lora_alpha": 16}
