"""The largest sizes that a config may name, whoever wrote it: a person, or a file that came with weights.

Far above every model there is, and far below what takes this machine's memory or an hour to find out.
"""

LARGEST = {
    "num_layers": 1000, "hidden_size": 32_768, "intermediate_size": 262_144, "max_positions": 65_536,
    "num_heads": 1024, "image_size": 2048, "num_query_token": 4096, "num_frames": 1024, "embed_dim": 65_536,
    "max_txt_len": 65_536, "num_beams": 1000, "max_len": 65_536,
}  # fmt: skip
