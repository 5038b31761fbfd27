"""vLLM's CPU platform, with the Ray resource name that `ray start --resources` offers."""


def activate() -> str:
    return "ray_cpu_platform.platform.RayCpuPlatform"
