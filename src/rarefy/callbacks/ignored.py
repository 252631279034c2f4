"""Callbacks and loggers of Cerebras' Model Zoo that a configuration may name and rarefy leaves out.

Each maps to what takes its place; empty where it concerns a Cerebras system only. Nothing that changes what
is trained belongs here.
"""

from __future__ import annotations

from collections.abc import Mapping

IGNORED: Mapping[str, str] = {
    "AutoRestart": "run the same command again",
    "CheckLoss": "the trainer skips steps that are not finite",
    "ComputeNormGNS": "",
    "CountParams": "--validate_only counts them",
    "DebugArgsPath": "",
    "DumpActivations": "",
    "DumpAvailableTensorNames": "",
    "DurationProfiler": "",
    "EmailNotification": "",
    "FlopUtilization": "",
    "GlobalFlags": "",
    "KeepNCheckpoints": "checkpoint.keep_last",
    "LogInputSummaries": "",
    "LogOptimizerParamGroup": "lr is always logged",
    "ModelEvalMetrics": "the model's metrics are always logged",
    "ModelZooParamsMetadata": "params.yaml of each checkpoint",
    "NaNChecker": "the trainer skips steps that are not finite",
    "NormTensorListener": "",
    "OpProfiler": "",
    "Profiler": "",
    "RateProfiler": "the rate is always logged",
    "SamplesStreamedInfo": "",
    "SavePerformanceData": "",
    "ScopedEvalFlags": "",
    "ScopedTrainFlags": "",
    "ScopedValidateFlags": "",
    "SlackNotification": "",
    "SummaryTensorListener": "",
    "TelemetryLogger": "",
    "WeightCompression": "",
}
