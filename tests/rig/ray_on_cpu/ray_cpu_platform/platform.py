from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    # A resource Ray knows from elsewhere, so that it needs no GPU and collides with none.
    ray_device_key = "HPU"
