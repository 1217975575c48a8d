"""Zeroth-order textual inversion (ZOODiP, arXiv 2503.14868): a word is learned from forward passes only.

A word is one or more vectors that a text encoder reads in the place of a token. Its gradient is estimated from the
loss at randomly perturbed words, so nothing is differentiated: any model in any weight format can be used, as loaded.

word         the shape of a word: its vectors for each text encoder, as one row of numbers
directions   the random directions in which a word is perturbed
estimators   gradients from differences of losses (Eq. 3), and two estimators with less variance
subspace     directions along which the word no longer moves are left out of the gradient (Eq. 4-8)
examples     which picture, noise level and noise each step uses; partial uniform timestep sampling
adam         Adam on one row of numbers
signal       how large a perturbation must be for the rounding of the model's weights
settings     all settings; the paper's
training     the loop, with training states to resume from

Units: perturbations and step sizes are multiples of a part's ``size``, the root mean square of the numbers in its
encoder's vocabulary, because encoders differ in it a hundredfold.
"""
