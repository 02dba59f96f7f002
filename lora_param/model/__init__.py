"""Live `nn.Module`s: registering LoRA on their weights, and everything done with it afterwards."""
