"""The values that options of methods may have, as enums for the code that branches on them."""

from ..request.choices import Choice


class Gradient(Choice):
    """Values of `gradient` (`mini_llm`): forward passes, back-propagation, or a control independent of the loss."""

    ZEROTH_ORDER = "zeroth_order"
    EXACT = "exact"
    ONES = "ones"
    RANDOM = "random"


class Perturbed(Choice):
    """Values of `perturb` (`mini_llm`): every weight, or the gate of every unit."""

    WEIGHTS = "weights"
    UNITS = "units"


class NoiseDistribution(Choice):
    """Values of `noise` (`mini_llm`): ±1, or normally distributed numbers."""

    RADEMACHER = "rademacher"
    GAUSSIAN = "gaussian"


class Aggregation(Choice):
    """Values of `aggregation` (`mini_llm`): the sum of the sensitivities of a unit's weights, their mean, or the root
    of their sum of squares."""

    SUM = "sum"
    MEAN = "mean"
    L2 = "l2"


class Salience(Choice):
    """Values of `salience` (`taylor`): the absolute value is taken of the unit's sum, or of every element."""

    VECTOR = "vector"
    ELEMENT = "element"


class Parametrization(Choice):
    """Values of `parametrization` (`policy_gradient`): a keep ratio per site, or a keep probability per unit."""

    RATIO = "ratio"
    UNIT = "unit"


class Estimator(Choice):
    """Values of `estimator` (`policy_gradient`): the baseline is the other masks' loss, or its moving average."""

    LEAVE_ONE_OUT = "leave_one_out"
    MOVING_AVERAGE = "moving_average"


class Initialization(Choice):
    """Values of `initialization` (`policy_gradient`): how scores become probabilities, or a start without scores."""

    SIGMOID = "sigmoid"
    MIN_MAX = "min_max"
    CONSTANT = "constant"
    RANDOM = "random"
