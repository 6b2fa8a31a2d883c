"""The probe from the command line, and what it refuses."""

from __future__ import annotations

import pytest
from messages import refused
from typer.testing import CliRunner

from tpaw.cli import app
from tpaw.config.schema import RunConfig
from tpaw.probe.measure import probe, shortened
from tpaw.runtime.interrupt import StopSignal
