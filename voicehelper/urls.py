"""Every URL: the admin and the API. What monitoring serves, its middleware answers."""

from django.contrib import admin
from django.urls import include, path

from voicehelper.api_docs import DescriptionView, DocsView

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/v1/schema/", DescriptionView.as_view(), name="api-description"),
    path("api/v1/docs/", DocsView.as_view()),
    path("api/v1/", include("voicehelper.identity.urls")),
    path("api/v1/", include("voicehelper.conversations.urls")),
    path("api/v1/", include("voicehelper.knowledge.urls")),
    path("api/v1/", include("voicehelper.notifications.urls")),
    path("api/v1/", include("voicehelper.analytics.urls")),
    path("api/v1/", include("voicehelper.audit.urls")),
]

handler400 = "voicehelper.problems.bad_request"
handler403 = "voicehelper.problems.permission_denied"
handler404 = "voicehelper.problems.page_not_found"
handler500 = "voicehelper.problems.server_error"
