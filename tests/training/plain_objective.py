"""An objective without networks of its own, for tests of the loop around it."""

from torch import nn, ones_like


class PlainObjective(nn.Module):
    """Draws the weights of a part to the batch's "target".

    Where the batch has a "factor", which may be no number, its loss is that many times as large.
    """

    extra: dict = {"distance": 0.0}  # noqa: RUF012 - as objectives have it

    def __init__(self, module):
        super().__init__()
        self.module = module

    def weights(self, batch):
        return {"distance": ones_like(batch["target"])}

    def forward(self, batch):
        total = sum(parameter.mean() for parameter in self.module.parameters())
        return {"distance": (total - batch["target"]) ** 2 * batch.get("factor", 1.0)}, {}
