"""Computes what a model predicts, and why. `clean_transformer.analysis.plots` draws figures."""

from clean_transformer.analysis.attribution import LogitAttribution as LogitAttribution
from clean_transformer.analysis.attribution import logit_attribution as logit_attribution
from clean_transformer.analysis.lens import logit_lens as logit_lens
from clean_transformer.analysis.prediction import Prediction as Prediction
from clean_transformer.analysis.prediction import TokenScore as TokenScore
from clean_transformer.analysis.prediction import predict as predict
from clean_transformer.analysis.text_page import Explanation as Explanation
from clean_transformer.analysis.text_page import explain as explain
from clean_transformer.analysis.text_page import write_html as write_html
