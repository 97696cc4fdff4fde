"""Logical axis names of parameters and activations; `jaxlora.parallel` maps them to a mesh.

Einsum letters used in the code: B batch, T query position, S key position, D embed, N query heads,
K key-value heads, G = N / K, H head_dim, F mlp, V vocab, E experts, R LoRA rank, L layers.
"""

BATCH = "batch"
SEQUENCE = "sequence"
EMBED = "embed"
EMBED_OUT = "embed_out"
HEADS = "heads"
KV_HEADS = "kv_heads"
MLP = "mlp"
VOCAB = "vocab"
LAYERS = "layers"
HEAD_DIM = "head_dim"
POSITIONS = "positions"
EXPERT = "expert"
EXPERT_SCORES = "expert_scores"
TOKEN_TYPES = "token_types"
LABELS = "labels"
LATENT = "latent"
