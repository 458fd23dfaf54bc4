"""Writes models as transformers 4, pytorch_block_sparse and compressed-tensors would: the same keys, dtypes and shapes.

Each layout is written by plain loops from its description; nothing of bertkern is imported.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

QUERY = "encoder.layer.0.attention.self.query"


def write(folder: Path, state: dict[str, Tensor], config: dict, file: str = "model.safetensors") -> None:
    """config.json and a file of weights; with a file of "sharded", two of them and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    state = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
    if file == "sharded":
        names = sorted(state)
        parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for part, held in parts.items():
            save_file({name: state[name] for name in held}, folder / part, {"format": "pt"})
        index = {"metadata": {}, "weight_map": {name: part for part, held in parts.items() for name in held}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif file.endswith(".safetensors"):
        save_file(state, folder / file, {"format": "pt"})
    else:
        torch.save(state, folder / file)


def config_of(model: nn.Module, **more) -> dict:
    """What transformers writes into config.json."""
    return {**json.loads(model.config.to_json_string(use_diff=False)), "architectures": [type(model).__name__], **more}


def distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with tied tensors under one name only, as safetensors wants them."""
    seen: dict[int, str] = {}
    return {n: t for n, t in state.items() if t.numel() == 0 or seen.setdefault(t.data_ptr(), n) == n}


def without_heads(model: nn.Module, pruned: dict[int, list[int]]) -> dict[str, Tensor]:
    """The state dict of `model` after transformers 4 has removed heads."""
    state = distinct(model.state_dict())
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    for layer, gone in pruned.items():
        rows = [h * size + i for h in range(config.num_attention_heads) if h not in gone for i in range(size)]
        rows = torch.tensor(rows, dtype=torch.long)
        for name in list(state):
            path = name.split(".")
            if "layer" not in path or path[path.index("layer") + 1] != str(layer):
                continue
            if path[-2] in ("query", "key", "value", "q_lin", "k_lin", "v_lin"):
                state[name] = state[name][rows]
            elif name.endswith(("attention.output.dense.weight", "attention.out_lin.weight")):
                state[name] = state[name][:, rows]
    return state


def zero_heads(model: nn.Module, pruned: dict[int, list[int]]) -> None:
    """Makes heads of a whole model add nothing, in place: zero columns of the output projection."""
    size = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("attention.output.dense.weight", "attention.out_lin.weight")):
                layer = int(name.split(".layer.")[1].split(".")[0])
                for head in pruned.get(layer, []):
                    parameter[:, head * size : (head + 1) * size] = 0


def block_sparse(weight: Tensor, block: tuple[int, int] = (32, 32), seed: int | None = None) -> dict[str, Tensor]:
    """What a layer of pytorch_block_sparse holds of `weight` [N, K]: the blocks with a nonzero, in a shuffled order."""
    (n, k), (br, bc) = weight.shape, block
    places = [
        (r, c)
        for r in range(n // br)
        for c in range(k // bc)
        if bool((weight[r * br : (r + 1) * br, c * bc : (c + 1) * bc] != 0).any())
    ]
    order = list(range(len(places)))
    if seed is not None:
        order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed)).tolist()
    index = dict(zip(places, order, strict=True))
    data, blocks = torch.zeros(len(places) * br, bc), torch.zeros(len(places) * 2, dtype=torch.int32)
    for (r, c), i in index.items():
        turned = weight[r * br : (r + 1) * br, c * bc : (c + 1) * bc].t().contiguous()
        data[i * br : (i + 1) * br] = turned.view(br, bc)
        blocks[2 * i], blocks[2 * i + 1] = c, r
    by_column = sorted(places, key=lambda place: (place[1], place[0]))

    def starts(of: list[int], count: int) -> Tensor:
        return torch.tensor([sum(x < i for x in of) for i in range(count + 1)], dtype=torch.int32)

    def pairs(of: list[tuple[int, int]]) -> Tensor:
        return torch.tensor(of, dtype=torch.int32).view(-1, 2)

    return {
        "data": data,
        "cols_a": pairs([(c, index[r, c]) for r, c in places]),
        "row_start_ends_a": starts([r for r, c in places], n // br),
        "rows_b": pairs([(r, index[r, c]) for r, c in by_column]),
        "col_start_ends_b": starts([c for r, c in places], k // bc),
        "blocks": blocks,
    }


def bitmask(weight: Tensor, two_of_four: bool = False, column: bool = False) -> dict[str, Tensor]:
    """What a layer of compressed-tensors holds of `weight`.

    Args:
        two_of_four: the layout "sparse-24-bitmask", which stores two of every four whatever they are.
        column: shape as a column, as newer releases write it.
    """
    rows = weight if weight.dim() == 2 else weight[None]
    n, k = rows.shape
    packed, counts, values = torch.zeros(n, -(-k // 8), dtype=torch.uint8), [], []
    for r in range(n):
        kept = [c for c in range(k) if float(rows[r, c]) != 0]
        if two_of_four:
            kept = []
            for left in range(0, k, 4):
                group = sorted(range(left, left + 4), key=lambda c: -abs(float(rows[r, c])))
                kept += sorted(group[:2])
        for c in kept:
            packed[r, c // 8] |= 1 << (c % 8)
        values += [rows[r, c] for c in kept]
        counts.append(len(kept))
    compressed = torch.stack(values) if values else weight.new_zeros(0)
    shape = torch.tensor(weight.shape)
    made = {
        "shape": shape[:, None] if column else shape,
        "compressed": compressed.view(n, k // 2) if two_of_four else compressed,
        "bitmask": packed if weight.dim() == 2 else packed[0],
    }
    if not two_of_four:
        offsets = torch.tensor([sum(counts[:r]) for r in range(n)], dtype=torch.int64)
        made["row_offsets"] = offsets if weight.dim() == 2 else offsets[0]
    return made
