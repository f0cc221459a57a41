"""An ExportedProgram as an ONNX model whose initializers are the parameters, as they are.

torch's own optimisation is not used: it transposes weights into nameless initializers, and its
pattern rules took 436 s of profiled time for Tune-A-Video's demo UNet of 8 frames (10,469 nodes,
dynamic sizes), the passes below under 2 s.
"""

from __future__ import annotations

from pathlib import Path

import torch


def convert(program: torch.export.ExportedProgram, opset: int, inputs: list[str], output: str):
    """An `onnx_ir.Model` of a program that holds torch's own operators only.

    Args:
        inputs, output: names of the graph's.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    model = torch.onnx.export(
        program, (), opset_version=opset, dynamo=True, optimize=False, verbose=False,
        input_names=inputs, output_names=[output],
    ).model  # fmt: skip
    weights = set(model.graph.initializers)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        should_fold=lambda node: (
            False if any(v is not None and v.name in weights for v in node.inputs) else None
        ),
    )
    for tidy in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveUnusedNodesPass(),
        passes.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                # Every reader infers these by itself; the exporter's are half of a file's nodes.
                value.shape = value.type = None
    _name_sizes(model)
    return model


def _name_sizes(model) -> None:
    import onnx_ir

    sample, _, text = model.graph.inputs
    names = {"text": ("clips",), "sample": ("images", None, "height", "width")}
    for value, kind in ((sample, "sample"), (text, "text"), (model.graph.outputs[0], "sample")):
        if value.shape is None:
            continue
        sizes = list(value.shape)
        for i, name in enumerate(names[kind]):
            if name is not None and not isinstance(sizes[i], int):
                sizes[i] = name
        value.shape = onnx_ir.Shape(sizes)


def save(model, path: Path, external_bytes: int) -> list[Path]:
    """Writes the model, the weights beside it in path + ".data" where they are more than that.

    Returns:
        The files.
    """
    import onnx_ir

    total = sum(v.const_value.nbytes for v in model.graph.initializers.values())
    if total <= external_bytes:
        onnx_ir.save(model, path)
        return [path]
    data = path.with_name(f"{path.name}.data")
    onnx_ir.save(model, path, external_data=data.name)
    return [path, data]
