# One image for web, relay, consumers and one-shot commands: they differ in their command only.
FROM python:3.11.15-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app

COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY manage.py ./
COPY events_outbox events_outbox
COPY monitoring monitoring
COPY voicehelper voicehelper
# .data is all the application writes: the web workers' shared metrics.
RUN VOICEHELPER_ENV=staging DJANGO_SECRET_KEY=only-to-collect-files python manage.py collectstatic --noinput \
    && useradd --system --uid 10001 --no-create-home app \
    && install -d -o app .data

USER 10001
EXPOSE 8000
ENV WEB_HOST=0.0.0.0
CMD ["gunicorn", "-c", "voicehelper/gunicorn.conf.py"]
