"""`python -m nvae.report RUN`: a page about a run; see :mod:`nvae.report.command`."""

from nvae.command_line import interruptible

if __name__ == "__main__":
    with interruptible():  # the imports take seconds
        from nvae.report.command import main

        main()
