"""Fully connected classifiers from scratch, on NumPy and CuPy: `catopt_xp.train(device="cuda")`.

The public names are loaded when they are first used, so importing the package is quick and touches no GPU.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from catopt_xp.version import __version__

if TYPE_CHECKING:  # what a type checker and an editor see; _HOME below is what runs
    from catopt_xp.averages import ExponentialMovingAverage as ExponentialMovingAverage
    from catopt_xp.averages import MovingAverage as MovingAverage
    from catopt_xp.averages import bias_correction as bias_correction
    from catopt_xp.averages import exponential_moving_average as exponential_moving_average
    from catopt_xp.averages import moving_average as moving_average
    from catopt_xp.backend import Backend as Backend
    from catopt_xp.backend import DeviceError as DeviceError
    from catopt_xp.backend import DeviceFallbackWarning as DeviceFallbackWarning
    from catopt_xp.backend import asnumpy as asnumpy
    from catopt_xp.backend import device_report as device_report
    from catopt_xp.backend import get_array_module as get_array_module
    from catopt_xp.backend import get_backend as get_backend
    from catopt_xp.batch_size import rule_of_thumb as rule_of_thumb
    from catopt_xp.callbacks import Callback as Callback
    from catopt_xp.callbacks import Checkpointing as Checkpointing
    from catopt_xp.callbacks import EarlyStopping as EarlyStopping
    from catopt_xp.callbacks import TrainState as TrainState
    from catopt_xp.checkpoint import CheckpointError as CheckpointError
    from catopt_xp.data import DataSet as DataSet
    from catopt_xp.data import get_cat_set as get_cat_set
    from catopt_xp.data import get_drawn_set as get_drawn_set
    from catopt_xp.data import load_data as load_data
    from catopt_xp.estimator import MLPClassifier as MLPClassifier
    from catopt_xp.estimator import MLPRegressor as MLPRegressor
    from catopt_xp.experiments import compare as compare
    from catopt_xp.experiments import optimizer_paths as optimizer_paths
    from catopt_xp.export import export_onnx as export_onnx
    from catopt_xp.export import export_safetensors as export_safetensors
    from catopt_xp.export import load_safetensors as load_safetensors
    from catopt_xp.history import History as History
    from catopt_xp.logs import CsvLog as CsvLog
    from catopt_xp.logs import JsonLog as JsonLog
    from catopt_xp.logs import TensorBoard as TensorBoard
    from catopt_xp.network import BaseRegressionModel as BaseRegressionModel
    from catopt_xp.network import DeepNetwork as DeepNetwork
    from catopt_xp.optim import Adam as Adam
    from catopt_xp.optim import BaseOptimizer as BaseOptimizer
    from catopt_xp.optim import GradientDescent as GradientDescent
    from catopt_xp.optim import Momentum as Momentum
    from catopt_xp.optim import RMSProp as RMSProp
    from catopt_xp.optim import make_optimizer as make_optimizer
    from catopt_xp.plots import plot_comparison as plot_comparison
    from catopt_xp.plots import plot_paths as plot_paths
    from catopt_xp.running import Interrupted as Interrupted
    from catopt_xp.running import TrainingDiverged as TrainingDiverged
    from catopt_xp.saving import load_model as load_model
    from catopt_xp.saving import load_state_dict as load_state_dict
    from catopt_xp.saving import save_state_dict as save_state_dict
    from catopt_xp.schedules import const_lr as const_lr
    from catopt_xp.schedules import get_cosine_func as get_cosine_func
    from catopt_xp.schedules import get_exponential_func as get_exponential_func
    from catopt_xp.schedules import get_hyperbola_func as get_hyperbola_func
    from catopt_xp.schedules import get_sqrt_func as get_sqrt_func
    from catopt_xp.schedules import get_staircase_func as get_staircase_func
    from catopt_xp.schedules import get_table_func as get_table_func
    from catopt_xp.schedules import with_warmup as with_warmup
    from catopt_xp.training import TrainResult as TrainResult
    from catopt_xp.training import train as train
    from catopt_xp.tuning import Tuning as Tuning
    from catopt_xp.tuning import tune as tune

_NAMES = {
    "averages": "ExponentialMovingAverage MovingAverage bias_correction exponential_moving_average moving_average",
    "backend": "Backend DeviceError DeviceFallbackWarning asnumpy device_report get_array_module get_backend",
    "callbacks": "Callback Checkpointing EarlyStopping TrainState",
    "checkpoint": "CheckpointError",
    "data": "DataSet get_cat_set get_drawn_set load_data",
    "estimator": "MLPClassifier MLPRegressor",
    "experiments": "compare optimizer_paths",
    "export": "export_onnx export_safetensors load_safetensors",
    "batch_size": "rule_of_thumb",
    "plots": "plot_comparison plot_paths",
    "history": "History",
    "logs": "CsvLog JsonLog TensorBoard",
    "network": "BaseRegressionModel DeepNetwork",
    "optim": "Adam BaseOptimizer GradientDescent Momentum RMSProp make_optimizer",
    "running": "Interrupted TrainingDiverged",
    "saving": "load_model load_state_dict save_state_dict",
    "schedules": "const_lr get_cosine_func get_exponential_func get_hyperbola_func get_sqrt_func get_staircase_func"
    " get_table_func with_warmup",
    "training": "TrainResult train",
    "tuning": "Tuning tune",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'catopt_xp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"catopt_xp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
