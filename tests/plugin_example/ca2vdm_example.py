"""An attention backend in its own distribution: everything that a third party has to write."""

from torch.nn.functional import scaled_dot_product_attention

from ca2vdm_cli import Backend, hookimpl


class ExampleBackend(Backend):
    name = "example"
    description = "an example"
    priority = 100

    def unavailable(self, device, dtype):
        return None if device.type == "cpu" else "runs on the CPU only"

    def attend(self, q, k, v, mask=None):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


@hookimpl
def ca2vdm_register_backends(register):
    register(ExampleBackend())
