"""The host's guiders, made as its nodes make them."""

from comfy_extras import nodes_custom_sampler as stock
from comfy_extras.nodes_perpneg import PerpNegGuider

CFG = 7.5


def cfg(model, positive, negative, scale=CFG):
    return stock.CFGGuider.execute(model, positive, negative, scale).args[0]


def basic(model, positive):
    return stock.BasicGuider.execute(model, positive).args[0]


def dual(model, *conditions, scales=(3.0, CFG), style="regular"):
    return stock.DualCFGGuider.execute(model, *conditions, *scales, style).args[0]


def perpendicular(model, positive, negative, empty, scale=1.0):
    return PerpNegGuider.execute(model, positive, negative, empty, CFG, scale).args[0]
