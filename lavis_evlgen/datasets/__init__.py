"""Caption and question data sets and their builders; importing this registers the builders with LAVIS."""

from lavis_evlgen.datasets.base import CaptionDataset, CaptionedImage
from lavis_evlgen.datasets.easy_vqa import EasyVqaBuilder
from lavis_evlgen.datasets.errors import DataError, UnreadableImage
from lavis_evlgen.datasets.image_captions import ImageCaptionDataset, ImageCaptionsBuilder
from lavis_evlgen.datasets.image_questions import ImageQuestionDataset, ImageQuestionsBuilder
from lavis_evlgen.datasets.moving_scenes import MovingScenesBuilder, MovingScenesDataset
from lavis_evlgen.datasets.questions import AskedImage, Question, QuestionDataset
from lavis_evlgen.datasets.scenes import ScenesBuilder, ScenesDataset
from lavis_evlgen.datasets.shards import ImageShards, ImageShardsBuilder, VideoShards
from lavis_evlgen.datasets.video_captions import VideoCaptionDataset, VideoCaptionsBuilder, WebvidBuilder

__all__ = [
    "AskedImage",
    "CaptionDataset",
    "CaptionedImage",
    "DataError",
    "EasyVqaBuilder",
    "ImageCaptionDataset",
    "ImageCaptionsBuilder",
    "ImageQuestionDataset",
    "ImageQuestionsBuilder",
    "MovingScenesBuilder",
    "MovingScenesDataset",
    "Question",
    "QuestionDataset",
    "ImageShards",
    "ImageShardsBuilder",
    "ScenesBuilder",
    "ScenesDataset",
    "UnreadableImage",
    "VideoCaptionDataset",
    "VideoCaptionsBuilder",
    "VideoShards",
    "WebvidBuilder",
]
