"""Do what the course's programs do with a checkpoint: print it, upscale the tensor in ``lr``, and train one step."""

import torch

import info  # noqa: F401  as the course's train.py does
from model import SRCNN

torch.manual_seed(0)
saved = torch.load("checkpoint.pth", map_location=torch.device("cpu"))
print(saved["epoch"], saved["psnr"], saved["opt"], saved["info"])
opt = saved["opt"]
print(opt.batch_size, opt.num_epoch, opt.save_freq, opt.lr)
model = SRCNN()
model.load_state_dict(saved["model_state_dict"])
optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
optimizer.load_state_dict(saved["optimizer_state_dict"])
model.eval()
with torch.no_grad():
    output = model(torch.load("lr"))
torch.save(output[0], "sr")
model.train()
model(torch.load("lr")).sum().backward()
before = [p.detach().clone() for p in model.parameters()]
optimizer.step()
change = max((p - b).abs().max().item() for p, b in zip(model.parameters(), before, strict=True))
print(optimizer.param_groups[0]["lr"], change)
