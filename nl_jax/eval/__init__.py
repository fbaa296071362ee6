"""Evaluation: Table 1 of the paper through one seqio mixture.

Data files become requests (`files`, `requests`, `wikitext`), requests rows of
tokens (`encoding`), rows log-likelihoods (`scoring`), those metrics (`metrics`)
and a table beside the published one (`table`, `report`). `tasks`, `converter`
and `vocabulary` are the same through seqio; they alone import it, and with it
TensorFlow. Requests and metrics equal those of lm-evaluation-harness 0.4.13.
"""
