from django.apps import AppConfig


class AnalyticsConfig(AppConfig):
    name = "voicehelper.analytics"
