from django.urls import path

from .views import DailyView, SummaryView

urlpatterns = [
    path("analytics/summary", SummaryView.as_view()),
    path("analytics/daily", DailyView.as_view()),
]
