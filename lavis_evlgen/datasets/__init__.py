"""Data sets of captions, questions and conversations; importing this registers their builders with LAVIS."""

from lavis_evlgen.datasets.base import CaptionDataset, CaptionedImage
from lavis_evlgen.datasets.builders.easy_vqa import EasyVqaBuilder
from lavis_evlgen.datasets.builders.image_captions import ImageCaptionDataset, ImageCaptionsBuilder
from lavis_evlgen.datasets.builders.image_conversations import ImageConversationDataset, ImageConversationsBuilder
from lavis_evlgen.datasets.builders.image_questions import ImageQuestionDataset, ImageQuestionsBuilder
from lavis_evlgen.datasets.builders.video_captions import VideoCaptionDataset, VideoCaptionsBuilder, WebvidBuilder
from lavis_evlgen.datasets.questions import AskedImage, Question, QuestionDataset
from lavis_evlgen.datasets.shards.dataset import ImageShards, ImageShardsBuilder, VideoShards
from lavis_evlgen.datasets.synthetic.moving_scenes import MovingScenesBuilder, MovingScenesDataset
from lavis_evlgen.datasets.synthetic.scene_questions import SceneQuestionsBuilder, SceneQuestionsDataset
from lavis_evlgen.datasets.synthetic.scenes import ScenesBuilder, ScenesDataset
from lavis_evlgen.media.errors import DataError, UnreadableImage

__all__ = [
    "AskedImage",
    "CaptionDataset",
    "CaptionedImage",
    "DataError",
    "EasyVqaBuilder",
    "ImageCaptionDataset",
    "ImageCaptionsBuilder",
    "ImageConversationDataset",
    "ImageConversationsBuilder",
    "ImageQuestionDataset",
    "ImageQuestionsBuilder",
    "MovingScenesBuilder",
    "MovingScenesDataset",
    "Question",
    "QuestionDataset",
    "ImageShards",
    "ImageShardsBuilder",
    "SceneQuestionsBuilder",
    "SceneQuestionsDataset",
    "ScenesBuilder",
    "ScenesDataset",
    "UnreadableImage",
    "VideoCaptionDataset",
    "VideoCaptionsBuilder",
    "VideoShards",
    "WebvidBuilder",
]
