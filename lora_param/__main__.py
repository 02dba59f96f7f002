"""`python -m lora_param`, the same as `lora-param`."""

from lora_param.cli import main

if __name__ == "__main__":
    main()
