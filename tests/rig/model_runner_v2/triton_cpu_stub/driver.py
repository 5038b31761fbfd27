from triton.backends.driver import DriverBase


class CpuStubDriver(DriverBase):
    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> None:
        raise NotImplementedError

    def get_active_torch_device(self) -> None:
        raise NotImplementedError

    def get_benchmarker(self) -> None:
        raise NotImplementedError
