"""Detectors of torchvision, and cascades of them, on the maps of any network."""

from acmix.detection.detectors import DETECTORS, Detector, create_detector

__all__ = ["DETECTORS", "Detector", "create_detector"]
