"""What predictions are: typed results, each of which can be saved, and drawn where there is something to see."""

from unmask.systems.prediction.depth import Depth
from unmask.systems.prediction.detections import Detections
from unmask.systems.prediction.restored import PictureResult
from unmask.systems.prediction.result import Result
from unmask.systems.prediction.scores import Scores, bars
from unmask.systems.prediction.segmentation import Segment, Segmentation

__all__ = ["Depth", "Detections", "PictureResult", "Result", "Scores", "Segment", "Segmentation", "bars"]
