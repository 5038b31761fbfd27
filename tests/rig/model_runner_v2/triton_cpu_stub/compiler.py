from triton.backends.compiler import BaseBackend


class CpuStubBackend(BaseBackend):
    @staticmethod
    def supports_target(target: object) -> bool:
        return False

    def hash(self) -> str:
        raise NotImplementedError

    def parse_options(self, options: dict) -> object:
        raise NotImplementedError

    def add_stages(self, stages: dict, options: object, language: object) -> None:
        raise NotImplementedError

    def load_dialects(self, context: object) -> None:
        raise NotImplementedError

    def get_module_map(self) -> dict:
        raise NotImplementedError
