"""The embedded default: a digit net trained on the spot, and LoRA's whole life on it.

The 1,797 digits beside this file are the test set of "Optical Recognition of Handwritten Digits"
(E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning Repository), licence CC BY 4.0; see
README.md.
"""
