from django.urls import path

from .views import DocumentContentView, DocumentsView, DocumentView, SearchView

urlpatterns = [
    path("documents", DocumentsView.as_view()),
    path("documents/<uuid:pk>", DocumentView.as_view()),
    path("documents/<uuid:pk>/content", DocumentContentView.as_view()),
    path("search", SearchView.as_view()),
]
