"""Several levels of processor features in one artifact: the best one decides how weights lie, the others read the same.

Capture and the passes that no machine matters for run once. Then each level is lowered and built, one after the other,
and only its object files stay: a compile needs the memory of one level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmc.artifact import FunctionEntry, Level, TargetInfo, library_name
from llmc.caps import Capabilities
from llmc.pipeline.lower import build_module, lower_graph
from llmc.pipeline.quality import NO_CHECK
from llmc.pipeline.tuning import tuned_choice
from llmc.spec import CompileSpec
from llmc.stages import StageRunner
from llmc.targets.backend import Backend, Built
from llmc.writer import ArtifactWriter

if TYPE_CHECKING:
    from llmc.frontend.graph import SourceModel
    from llmc.passes.step_module import LoweredGraph, StepModule
    from llmc.passes.weight_layouts import WeightLayouts
    from llmc.schedules.records import Record
    from llmc.schedules.tuned_choice import Tuned


@dataclass(frozen=True)
class CompiledLevel:
    """What a level came to.

    Attributes:
        caps: what it was generated for.
        step: its step functions; params are the same for all levels.
        built: its code.
        tuned: has the tuning records that were used.
    """

    caps: Capabilities
    step: StepModule
    built: Built
    tuned: Tuned

    def entry(self, library: str) -> Level:
        """For the manifest, not checked."""
        from llmc.passes.count_kernels import CountKernels
        from llmc.tune.extract import kernel_uses

        caps, step = self.caps, self.step
        kernels = CountKernels()(step)
        functions = tuple(
            FunctionEntry(n, step.inputs, (step.output,), kernels[n]) for n in ("step", "decode")
        )
        return Level(
            library=library,
            target=TargetInfo(caps.target, caps.preset, caps.triple, caps.mcpu, caps.features),
            functions=functions,
            quality=NO_CHECK,
            tuning_records=tuple(record.to_json() for record in self.tuned.used.values()),
            tasks=tuple(use.to_json() for use in kernel_uses(step.module)),
        )


@dataclass(frozen=True)
class LevelCompiler:
    """Lowers and builds one level of a graph after the other.

    Attributes:
        known: tuning records to choose schedules by.
    """

    rewritten: LoweredGraph
    spec: CompileSpec
    source: SourceModel
    backend: Backend
    known: list[list[Record]]
    runner: StageRunner

    def compile(self, caps: Capabilities, layouts: WeightLayouts | None = None) -> CompiledLevel:
        """The stages lower and build for one level."""
        tuned = tuned_choice(self.backend, caps, self.known, self.runner.progress)
        target = self.backend.tvm_target(caps)
        args = (self.rewritten, self.spec, self.source, caps, target, self.runner, tuned, layouts)
        step = self.runner.run("lower", lower_graph, *args)
        built = self.runner.run("build", build_module, step, self.backend, caps, target, self.runner)
        return CompiledLevel(caps, step, built, tuned)

    def compile_lower(
        self, levels: tuple[Capabilities, ...], best: CompiledLevel, writer: ArtifactWriter
    ) -> tuple[tuple[Level, ...], dict[str, Record]]:
        """Levels below the best one: their code goes to the writer; entries for the manifest, and records used."""
        from llmc.passes.weight_layouts import WeightLayouts

        params = best.step.params
        layouts = WeightLayouts((param, param.layout_text) for param in params)
        entries, used = [], dict(best.tuned.used)
        for caps in levels:
            self.runner.progress.note(f"level {caps.preset}")
            level = self.compile(caps, layouts)
            if level.step.params != params:
                raise AssertionError(f"{caps.preset} packs weights in another way than {best.caps.preset}")
            entry = level.entry(library_name(caps.preset.partition("/")[2]))
            writer.add_library(entry.library, level.built.executable)
            entries.append(entry)
            used.update(level.tuned.used)
        return tuple(entries), used
