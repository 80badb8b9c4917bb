"""Reports of a pruning: figures as JSON, tables, pictures, and a page with all of them."""

from ..record.outcome import Speedup as Speedup
from ..words import render_table as render_table
from .numbers import calibration_in_words as calibration_in_words
from .pictures import plot_history as plot_history
from .pictures import plot_plan as plot_plan
from .pruning import PruningReport as PruningReport
from .tables import history_table as history_table
from .tables import plan_table as plan_table
from .tables import report_table as report_table
