"""What others will do with an adapter: rules with their sources, judged on headers and configs.

`facts` reads what there is to know of an adapter without torch, `rules.toml` says what each
consumer does with it, `judge` puts the two together. A new version of a consumer is a changed line.
"""
