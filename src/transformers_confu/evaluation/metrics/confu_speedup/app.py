import json
from pathlib import Path

import evaluate
import gradio as gr


metric = evaluate.load(str(Path(__file__).with_name("confu_speedup.py")))
names = list(metric.features)


def compute(*values):
    try:
        return metric.compute(**{name: json.loads(value) for name, value in zip(names, values, strict=True)})
    except ValueError as error:
        raise gr.Error(str(error)) from error


gr.Interface(
    fn=compute,
    inputs=[gr.Textbox(label=name, placeholder="a JSON list") for name in names],
    outputs=gr.JSON(label=metric.name),
    title=metric.name,
    description=metric.description,
).launch()
