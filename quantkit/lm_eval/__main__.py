"""`python -m quantkit.lm_eval` is lm-eval's command line, and knows `--model quantkit`."""

from quantkit.lm_eval import main

main()
