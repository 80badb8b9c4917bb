"""`optimum-cli fwdprune export`: write a pruned checkpoint for programs without support for pruned models."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from .base import Command
from .options import (
    add_loading_options,
    add_tokenizer_option,
    load_model,
    load_processor,
    load_tokenizer,
    loading_options,
)
from .parser import choice


class ExportCommand(Command):
    USAGE = "MODEL OUTPUT"
    DESCRIPTION = (
        "Write a pruned checkpoint in another program's format. stock: transformers loads it without this package, as "
        "do programs that load transformers checkpoints; every layer must have been cut alike (prune --layout stock). "
        "gguf: llama.cpp runs it."
    )
    EXAMPLES = (
        "export pruned exported --format stock",
        "export pruned pruned.gguf --format gguf --outtype q8_0",
    )

    @staticmethod
    def add_options(parser: ArgumentParser) -> None:
        from optimum_fwdprune.request.gguf import GGUF_TYPES

        parser.add_argument("model", help="Folder or Hub repository of the pruned model, a causal language model.")
        parser.add_argument("output", help="Folder to write, new or empty; for gguf, the file to write.")
        parser.add_argument(
            "--format",
            **choice(("stock", "gguf")),
            help="Format to write. Default: gguf if OUTPUT ends in .gguf, else stock.",
        )
        gguf = parser.add_argument_group("GGUF files")
        gguf.add_argument(
            "--outtype",
            **choice(GGUF_TYPES),
            help="Dtype of the matrices; llama-quantize must be on the PATH for those with a k (default: f16).",
        )
        gguf.add_argument(
            "--pre_tokenizer",
            help="llama.cpp's name for the way text is split before BPE. Default: detected from the tokenizer.",
        )
        parser.add_argument("--overwrite", action="store_true", help="Replace an output that exists.")
        add_tokenizer_option(parser)
        add_loading_options(parser)

    def execute(self) -> None:
        from optimum_fwdprune.files import check_output_file, check_output_folder

        is_file = (self.args.format or Path(self.args.output).suffix.lstrip(".")) == "gguf"
        for name in ("outtype", "pre_tokenizer"):
            if getattr(self.args, name) is not None and not is_file:
                raise ValueError(
                    f"--{name} is for GGUF files, and {self.args.output} will be a folder. Pass --format gguf, or "
                    f"name an output that ends in .gguf."
                )
        if is_file:
            check_output_file(self.args.output, self.args.overwrite)
        else:
            check_output_folder(self.args.output, self.args.overwrite)

        from optimum_fwdprune.export import export_gguf, export_stock
        from optimum_fwdprune.export.gguf_quantize import check_writable
        from optimum_fwdprune.loading.source import Source
        from optimum_fwdprune.record.reading import read_record

        if is_file:
            outtype = self.args.outtype or "f16"
            check_writable(outtype)
            tokenizer = load_tokenizer(self.args.model, self.args)
            model = load_model(self.args.model, self.args)
            options = (outtype, self.args.overwrite, self.args.pre_tokenizer)
            file = export_gguf(model, tokenizer, self.args.output, *options)
            print(f"Written to {file} ({file.stat().st_size / 1e6:,.1f} MB).")
        else:
            processor = load_processor(self.args.model, self.args)
            model = load_model(self.args.model, self.args)
            # A model of a stock class is known as a pruned one by its record.
            read_record(model, self.args.model, Source(loading_options(self.args)))
            written = export_stock(model, processor, self.args.output, self.args.overwrite)
            print(f"Written to {written}; its logits equal those of {self.args.model}.")
