"""The command `clean-transformer predict`."""

from typing import Annotated

import typer

from clean_transformer.cli import options
from clean_transformer.cli.terminal import print_table, progress, read_text, write_json
from clean_transformer.support.files import STANDARD_OUTPUT, require_folder


def predict(
    text: options.Text = None,
    file: options.TextFile = None,
    top: Annotated[
        int, typer.Option(help="Show this many of the most and of the least likely tokens.")
    ] = 5,
    weights: options.Weights = None,
    tokenizer: options.Tokenizer = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    json: options.JsonFile = None,
) -> None:
    """Show the most likely next tokens, and the probability and loss of each token of the text.

    Exit status: 0 = done, 2 = could not run, 130 = interrupted.
    """
    require_folder(json)
    read = read_text(text, file)

    from clean_transformer.analysis.prediction import predict as predict_text
    from clean_transformer.cli.loading import read_model
    from clean_transformer.text.symbols import visible

    with progress() as on_step:
        on_step("reading the weights")
        model = read_model(weights, device, dtype, tokenizer)
        on_step("running the model")
        prediction = predict_text(model, read, top)
    ids = model.to_tokens(read)[0].tolist()
    probabilities = [None, *prediction.token_probabilities.tolist()]
    losses = [None, *prediction.losses.tolist()]

    if json is not None:
        write_json(
            json,
            top=[vars(score) for score in prediction.top],
            bottom=[vars(score) for score in prediction.bottom],
            tokens=[
                {"id": id_, "token": word, "probability": probability, "loss": loss}
                for id_, word, probability, loss in zip(
                    ids, prediction.tokens, probabilities, losses, strict=True
                )
            ],
        )
    if json == STANDARD_OUTPUT:
        return
    for which, scores in (("most", prediction.top), ("least", prediction.bottom)):
        rows = [
            (visible(score.token), score.id, score.logit, score.probability) for score in scores
        ]
        columns = ["token", "id", "logit", "probability"]
        print_table(f"the {which} likely next tokens", columns, rows)
    rows = [*zip(map(visible, prediction.tokens), ids, probabilities, losses, strict=True)]
    print_table("the text", ["token", "id", "probability", "loss"], rows)
    if len(prediction.losses):
        mean = prediction.losses.mean()
        print(f"mean loss {mean:.4g} nats per token, perplexity {mean.exp():.4g}")
