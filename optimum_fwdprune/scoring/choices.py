"""The values that options of methods may have, for the code that decides by them."""

from ..request.choices import Choice


class Gradient(Choice):
    """Of `gradient` (`mini_llm`): forward passes, back-propagation, or a control that knows nothing of the loss."""

    ZEROTH_ORDER = "zeroth_order"
    EXACT = "exact"
    ONES = "ones"
    RANDOM = "random"


class Perturbed(Choice):
    """Of `perturb` (`mini_llm`): every weight, or the gate of every unit."""

    WEIGHTS = "weights"
    UNITS = "units"


class NoiseDistribution(Choice):
    """Of `noise` (`mini_llm`): ±1, or normally distributed numbers."""

    RADEMACHER = "rademacher"
    GAUSSIAN = "gaussian"


class Aggregation(Choice):
    """Of `aggregation` (`mini_llm`): the sum of the sensitivities of a unit's weights, their mean, or the root of
    their sum of squares."""

    SUM = "sum"
    MEAN = "mean"
    L2 = "l2"


class Salience(Choice):
    """Of `salience` (`taylor`): summed over the unit before its absolute value is taken, or element by element."""

    VECTOR = "vector"
    ELEMENT = "element"


class Parametrization(Choice):
    """Of `parametrization` (`policy_gradient`): a keep ratio per site, or a keep probability per unit."""

    RATIO = "ratio"
    UNIT = "unit"


class Estimator(Choice):
    """Of `estimator` (`policy_gradient`): the baseline is the loss of the other masks, or its moving average."""

    LEAVE_ONE_OUT = "leave_one_out"
    MOVING_AVERAGE = "moving_average"


class Initialization(Choice):
    """Of `initialization` (`policy_gradient`): how scores become probabilities, or a start without scores."""

    SIGMOID = "sigmoid"
    MIN_MAX = "min_max"
    CONSTANT = "constant"
    RANDOM = "random"
