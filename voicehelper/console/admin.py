"""What the console adds to the admin site: the overview; groups in the theme, as everything else."""

from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.models import Group
from django.urls import URLPattern, path

from events_outbox.admin.read_only import ModelAdmin

from .views import overview_fragment

admin.site.index_title = "Overview"


def _extra_urls() -> list[URLPattern]:
    fragment = admin.site.admin_view(overview_fragment)
    return [path("overview/fragment/", fragment, name="overview_fragment")]


setattr(admin.site, "extra_urls", _extra_urls)  # noqa: B010  # the theme's hook, which has no type

admin.site.unregister(Group)


@admin.register(Group)
class GroupAdmin(DjangoGroupAdmin, ModelAdmin):
    pass
